"""A small Mixture-of-Experts that was really trained: 16 experts, 4 per token, grown out of the demo model.

No trained MoE comes from the package index. The demo model's FFNs are divided into 4 slices, each with 4 copies (``virtual_groups``,
the same function as the demo model's at first), and all of it is trained on documentation, code and science (``domains.py``) with the
losses of ``configs/train/upcycle_cpt.yaml``. It is kept in the cache of the benchmarks.

    python -P tests/benchmarks/compressing/small_moe.py

prints its losses beside those of the demo model, and its folder last.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

from domains import DOMAINS, FOREIGN, parted, texts
from smollm2 import cache_folder
from training_curves import write_domains

import upcycle

TOKENS = 2_000_000
LENGTH, BATCH = 256, 8
SHAPE: dict[str, Any] = {"method": "virtual_groups", "top_k": 4, "parameters": {"granularity": 4, "expansion": 4}}
LOSSES = {"switch_balance": {"coefficient": 0.01}, "router_z": {"coefficient": 0.001}}


def recipe(start: Path, tokens: int, work: Path) -> dict[str, Any]:
    """The training run."""
    steps = -(-tokens // (LENGTH * BATCH))
    return {
        "model": str(start),
        "output": str(work / "run"),
        "data": write_domains(work / "text", {domain: parted(domain) for domain in DOMAINS}),
        "length": LENGTH,
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "stages": {
            "steps": steps,
            "learning_rate": 2e-3,
            "schedule": {"kind": "cosine", "warmup": max(1, steps // 20), "floor": 0.1},
            "losses": LOSSES,
        },
        "saving": {"every": 50, "keep": 1},
        "log": {"validation": max(1, steps // 5)},
    }


def small_moe(tokens: int = TOKENS) -> Path:
    """Return the folder of the trained model; it is made where it is not in the cache."""
    work = cache_folder() / f"small-moe-{tokens}"
    done = work / "model"
    if not done.exists():
        work.mkdir(parents=True, exist_ok=True)
        start = work / "start"
        if not start.exists():
            upcycle.convert("demo", start, **SHAPE)
        upcycle.train(recipe(start, tokens, work), print)
        (work / "run" / "model").rename(done)
        shutil.rmtree(work / "run")
    return done


def main() -> int:
    """Make it, and print what it knows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    wanted = parser.parse_args()
    folder = small_moe(wanted.tokens)
    from compress_quality import perplexities

    _, evaluation = texts((*DOMAINS, FOREIGN))
    demo = Path(upcycle.__file__).parent / "demo" / "model"
    for name, model in (("demo", demo), ("trained MoE", folder)):
        found = perplexities(model, evaluation)
        print(name, ", ".join(f"{domain} {value:.2f}" for domain, value in found.items()))
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
