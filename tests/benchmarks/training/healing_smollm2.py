"""SmolLM2-135M split to 50% of its neurons as ``configs/convert/split_50.yaml`` says, in fewer experts, which train faster, and
healed by its dense parent: perplexity on held-out documents of every domain, dense, split, and healed. About 93 MB are
downloaded once. How many tokens an hour would give is printed with the table.

    python -P tests/benchmarks/training/healing_smollm2.py --out docs/measured/healing_smollm2.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from math import exp
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from domains import DOMAINS, parted, texts
from healing import BALANCE, DISTILLED, ROOT
from smollm2 import dense_folder
from training_curves import read_curve, validation_loss, write_domains, write_page

import upcycle
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.trainers.run.loop import train
from upcycle.trainers.run.step_reports import read_log

LENGTH, BATCH = 512, 4
PIECES = 48


def convert(source: Path, out: Path) -> Path:
    """The shipped recipe's split, calibrated on the domains' own text."""
    if not (out / "config.json").exists():
        shipped = read_recipe(ROOT / "configs" / "convert" / "split_50.yaml")
        calibration = {**shipped["calibration"], "text": [str(path) for path in texts()[0]]}
        told: dict[str, Any] = {**shipped, "source": str(source), "pieces": PIECES, "calibration": calibration}
        upcycle.convert(out=out, **{**told, "verification": {"enabled": False}})
    return out


def recipe(model: Path, output: Path, data: dict[str, Any], tokens: int, rate: float, router: float) -> dict[str, Any]:
    """As ``upcycle train`` takes it."""
    steps = -(-tokens // (LENGTH * BATCH))
    stage = {
        "name": "heal",
        "steps": steps,
        "learning_rate": rate,
        "rates": {"router": router},
        "schedule": {"kind": "cosine", "warmup": max(1, steps // 10), "floor": 0.1},
        "losses": BALANCE,
        "distillation": DISTILLED["distillation alone"],
    }
    return {
        "model": str(model),
        "output": str(output),
        "data": {**data, "validation": {"tokens": 8192}},
        "length": LENGTH,
        "global_batch": BATCH,
        "micro_batch": 2,
        "stages": [stage],
        "saving": {"every": 25, "keep": 1, "export": False},
        "log": {"validation": max(1, steps // 5)},
    }


def main() -> None:
    """Convert, train, and print the table; with ``--out`` it is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    parser.add_argument("--router", type=float, default=1e-3, help="factor on the routers' rate (default: 1e-3)")
    parser.add_argument("--work", type=Path, help="keep the run here, and continue it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="healing-smollm2-"))
    source = dense_folder()
    data = write_domains(work / "text", {domain: parted(domain) for domain in DOMAINS})
    told = recipe(convert(source, work / "split"), work / "run", data, options.tokens, options.rate, options.router)
    log = work / "run" / "log.jsonl"
    before = max((line.get("tokens", 0) for line in read_log(log)), default=0) if log.exists() else 0
    started = time.perf_counter()
    if train(told).stopped:
        sys.exit(f"stopped by a signal; --work {work} continues, and only then is there a table")
    seconds = time.perf_counter() - started
    points = read_curve(work / "run").points
    trained = max(points)
    dense, split, healed = validation_loss(source, told), points[0], points[trained]
    added = trained - before  # a run that was stopped has trained on the others in another process
    lines = [
        f"{added:,} tokens in {seconds / 60:.0f} minutes, validations included ({added / seconds * 3600:,.0f} an hour); "
        f"perplexity on 8,192 held-out tokens of each:",
        "",
        "| domain | dense | split | healed | of the gap closed |",
        "|---|---:|---:|---:|---:|",
    ]
    for domain in DOMAINS:
        closed = (split[domain] - healed[domain]) / (split[domain] - dense[domain])
        values = " | ".join(f"{exp(loss[domain]):.2f}" for loss in (dense, split, healed))
        lines.append(f"| {domain} | {values} | {closed:.0%} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        write_page(options.out, "Healing SmolLM2-135M", "training/healing_smollm2.py", text)


if __name__ == "__main__":
    main()
