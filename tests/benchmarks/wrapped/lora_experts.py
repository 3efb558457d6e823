"""LoRA experts and adapters as experts on the demo model, beside one LoRA of as many parameters: equal tokens for all.

New text is prose and code that the demo model has not seen (``growing.py`` says which), half each. The dense model's own weights
stay in every run. ``one LoRA``: a pair of matrices beside the FFN's linear layers, of a rank that makes as many parameters as
MoCLE's experts; ``MoCLE``: 4 experts of rank 8 and a universal one, by 8 clusters of instructions, or by token; ``PESC``: 8 adapters
of 24 neurons, two per token. ``trained`` are the numbers that train, ``per token`` those that a token uses.

    python -P tests/benchmarks/wrapped/lora_experts.py --out docs/measured/lora_experts.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from domains import parted
from growing import BATCH, KINDS, LENGTH
from training_curves import cosine, run_recipe, trained, write_domains, write_page

import upcycle
from upcycle.files.records import read_record

RANK, EXPERTS = 8, 4
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "lora": ("one LoRA", None),
    "clusters": (
        "MoCLE, by cluster",
        {
            "method": "mocle",
            "parameters": {"rank": RANK, "clusters": 8},
            "calibration": {"text": "TEXT", "tokens": 16384},
        },
    ),
    "tokens": ("MoCLE's experts, by token", {"method": "mocle", "parameters": {"rank": RANK, "router": "tokens"}}),
    "pesc": ("PESC", {"method": "pesc", "parameters": {"rank": 24}}),
}
D, F, LAYERS = 192, 576, 6  # the demo model


def start(name: str, work: Path, data: dict[str, Any]) -> str:
    """Where a run begins."""
    keys = ARMS[name][1]
    if keys is None:
        return "demo"
    out = work / name
    if not out.exists():
        if "calibration" in keys:
            texts = [str(domain["text"]) for domain in data["domains"].values()]
            keys = {**keys, "calibration": {**keys["calibration"], "text": texts}}
        upcycle.convert("demo", out, **keys, verification={"enabled": False})
    return str(out)


def recipe(name: str, model: str, steps: int, rate: float, data: dict[str, Any]) -> dict[str, Any]:
    """A run, the same for all but for what trains."""
    rank = RANK * (EXPERTS + 1)
    of_lora = {"adapter": {"rank": rank, "alpha": 2 * rank, "targets": ["ffn"]}}
    stage = cosine(steps, rate, weight_decay=0.0)
    if name != "lora":
        stage["train"] = ["router", "experts"]
    if name == "pesc":
        stage["losses"] = {"switch_balance": {"coefficient": 0.01}}
    more = of_lora if name == "lora" else {}
    return run_recipe(model, data, stage, (LENGTH, BATCH), validated=max(1, steps // 4), **more)


def sizes(name: str, work: Path) -> tuple[int, int]:
    """How many numbers train, and how many of them a token uses."""
    if name == "lora":
        count = LAYERS * RANK * (EXPERTS + 1) * 3 * (D + F)
        return count, count
    plan = read_record(work / name)["plan"]
    every, idle = (
        plan["parameters_total"] - plan["parameters_dense"],
        plan["parameters_total"] - plan["parameters_active"],
    )
    table = 4096 * 8 + 8 if name == "clusters" else 0  # products of tokens with centroids, which are no weights
    return every - table, every - table - idle


def main() -> int:
    """Convert, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help=f"of training, {LENGTH * BATCH} tokens each")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="lora-experts-"))
    work.mkdir(parents=True, exist_ok=True)
    data = write_domains(work / "text", {kind: parted(domain) for kind, domain in KINDS.items()})
    runs = {
        f"{name}-{options.rate:g}-{options.steps}": recipe(
            name, start(name, work, data), options.steps, options.rate, data
        )
        for name in ARMS
    }
    curves = dict(zip(ARMS, trained(runs, work / "runs", options.jobs).values(), strict=True))
    lines = [f"| | trained | per token | {' | '.join(KINDS)} | mean |", "|---|---:|---:|" + "---:|" * (len(KINDS) + 1)]
    kinds = (*KINDS, None)
    before = " | ".join(f"{curves['lora'].losses(kind)[0][1]:.4f}" for kind in kinds)
    lines.append(f"| before | 0 | 0 | {before} |")
    for name, curve in curves.items():
        every, used = sizes(name, work)
        ends = " | ".join(f"{curve.losses(kind)[-1][1]:.4f}" for kind in kinds)
        lines.append(f"| {ARMS[name][0]} | {every:,} | {used:,} | {ends} |")
    text = (
        f"{options.steps} steps of {LENGTH * BATCH:,} tokens at a peak rate of {options.rate:g}, one seed; nats per token on held-out "
        "text.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.out:
        write_page(options.out, "LoRA experts on the demo model", "wrapped/lora_experts.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
