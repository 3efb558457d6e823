"""Virtual groups trained from each start: which gate, and where the weight scale goes.

The demo model's FFNs become 4 replicas of 4 shards, top-4, so that a token costs what it did. ``normalized`` gates on ``down`` keep
the function; the paper (arXiv 2410.07524) trains a softmax over all experts with the scale spread over gate, up and down. All runs
see the same new text in the same order (``growing.py`` says which), with the same losses and learning rate.

    python -P tests/benchmarks/training/virtual_groups.py --out docs/measured/virtual_groups_demo.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from domains import parted
from growing import BATCH, KINDS, LENGTH, recipe
from training_curves import Curve, trained, write_domains, write_page

import upcycle

# (gate, scale_placement); the first is the default, the last the paper's.
STARTS = (("normalized", "down"), ("normalized", "paper"), ("softmax", "down"), ("softmax", "paper"))
RATE = 1e-3


def start(gate: str, placement: str, seed: int, work: Path) -> str:
    """Where a run begins."""
    out = work / f"{gate}-{placement}-{seed}"
    if not out.exists():
        parameters = {"expansion": 4, "granularity": 4, "gate": gate, "scale_placement": placement}
        keys: dict[str, Any] = {"target": "qwen2_moe", "verification": {"enabled": False}}
        upcycle.convert("demo", out, method="virtual_groups", parameters=parameters, seed=seed, **keys)
    return str(out)


def table(curves: Mapping[tuple[str, str], Sequence[Curve]]) -> str:
    """Markdown: nats per token at the start and at the end, means of the seeds."""
    lines = [
        f"| gate | scale on | start | end: {' | end: '.join(KINDS)} | end: mean |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (gate, placement), seeds in curves.items():
        first = fmean(each.losses()[0][1] for each in seeds)
        ends = [fmean(each.losses(kind)[-1][1] for each in seeds) for kind in (*KINDS, None)]
        lines.append(f"| `{gate}` | `{placement}` | {first:.3f} | " + " | ".join(f"{end:.3f}" for end in ends) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="virtual-groups-"))
    work.mkdir(parents=True, exist_ok=True)
    data = write_domains(work / "text", {kind: parted(domain) for kind, domain in KINDS.items()})
    steps = -(-options.tokens // (LENGTH * BATCH))
    told = {
        f"{gate}-{placement}-{steps}-{seed}": recipe(
            "upcycled", RATE, seed, steps, 1, start(gate, placement, seed, work), data
        )
        for gate, placement in STARTS
        for seed in options.seeds
    }
    found = list(trained(told, work / "runs", options.jobs).values())
    count = len(options.seeds)
    curves = {each: found[at * count : (at + 1) * count] for at, each in enumerate(STARTS)}
    text = (
        f"{steps * LENGTH * BATCH:,} tokens at a peak rate of {RATE:g}, seeds {', '.join(map(str, options.seeds))}; nats per token on "
        f"held-out text.\n\n{table(curves)}"
    )
    print(text)
    if options.out:
        write_page(options.out, "Virtual groups on the demo model", "training/virtual_groups.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
