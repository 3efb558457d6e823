"""A small Mixture-of-Experts that was really trained: 16 experts, 4 per token, grown out of the demo model.

No trained MoE comes from the package index. The demo model's FFNs are divided into 4 slices, each with 4 copies (``virtual_groups``,
the same function as the demo model's at first), and all of it is trained on documentation, code and science (``domains.py``) with the
losses of ``configs/train/upcycle_cpt.yaml``. It is kept in the cache of the benchmarks.

    python -P tests/benchmarks/compressing/small_moe.py --dense --out docs/measured/small_moe.md

prints its perplexities beside those of the demo model, and its folder last. With ``--dense`` beside those of the demo model trained on
the same batches, too: a dense model in which as many neurons run for a token. It takes an hour of one core.
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
from training_curves import cosine, run_recipe, write_domains
from transformers import AutoModelForCausalLM

import upcycle

TOKENS = 8_000_000
LENGTH, BATCH = 256, 8
DEMO = Path(upcycle.__file__).parent / "demo" / "model"
SHAPE: dict[str, Any] = {"method": "virtual_groups", "top_k": 4, "parameters": {"granularity": 4, "expansion": 4}}
LOSSES = {"switch_balance": {"coefficient": 0.01}, "router_z": {"coefficient": 0.001}}


def recipe(start: Path, tokens: int, work: Path, losses: dict[str, Any]) -> dict[str, Any]:
    """The training run."""
    steps = -(-tokens // (LENGTH * BATCH))
    data = write_domains(work / "text", {domain: parted(domain) for domain in DOMAINS})
    stage, often = cosine(steps, 2e-3, 20, losses=losses), max(1, steps // 5)
    where = {"output": str(work / "run")}
    return run_recipe(start, data, stage, (LENGTH, BATCH), validated=often, saved=50, export=True, **where)


def small_moe(tokens: int = TOKENS) -> Path:
    """Return the folder of the trained model; it is made where it is not in the cache."""
    work = cache_folder() / f"small-moe-{tokens}"
    start = work / "start"
    if not (work / "model").exists() and not start.exists():
        work.mkdir(parents=True, exist_ok=True)
        upcycle.convert("demo", start, **SHAPE)
    return _trained(start, tokens, work, LOSSES)


def small_dense(tokens: int = TOKENS) -> Path:
    """Return the folder of the demo model, trained on the same batches."""
    work = cache_folder() / f"small-dense-{tokens}"
    work.mkdir(parents=True, exist_ok=True)
    return _trained(DEMO, tokens, work, {})


def _trained(start: Path, tokens: int, work: Path, losses: dict[str, Any]) -> Path:
    done = work / "model"
    if not done.exists():
        upcycle.train(recipe(start, tokens, work, losses), print)
        (work / "run" / "model").rename(done)
        shutil.rmtree(work / "run")
    return done


def main() -> int:
    """Make it, and print and write what it knows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--dense", action="store_true", help="train the dense model on the same batches, too")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    models = {"demo model": DEMO, "Mixture-of-Experts, 16 experts, top-4": small_moe(wanted.tokens)}
    if wanted.dense:
        models["demo model, trained on the same batches"] = small_dense(wanted.tokens)
    from compress_quality import perplexities

    kinds = (*DOMAINS, FOREIGN)
    _, evaluation = texts(kinds)
    lines = [
        f"Perplexity after {wanted.tokens:,} tokens of {', '.join(DOMAINS)}; {FOREIGN} was not trained on.",
        "",
        f"| model | parameters | {' | '.join(kinds)} |",
        f"|---|---:|{'---:|' * len(kinds)}",
    ]
    for name, model in models.items():
        found = perplexities(model, evaluation)
        parameters = AutoModelForCausalLM.from_pretrained(model).num_parameters()
        lines.append(f"| {name} | {parameters / 1e6:.1f} M | {' | '.join(f'{found[kind]:.2f}' for kind in kinds)} |")
    page = "\n".join(lines) + "\n"
    print(page)
    if wanted.out:
        wanted.out.write_text(page, encoding="utf-8")
    print(models["Mixture-of-Experts, 16 experts, top-4"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
