"""Does a short distillation of a cut MoE bring back what the uncut one would have written? Routers alone (Router KD), or all of it.

``small_moe.py``'s model is cut by ``compress_quality.py``'s way, and then trained on the text that it was trained on, with nothing but
the uncut model's next-token distributions as the target. Measured as there, before and after.

    python -P tests/benchmarks/compressing/distilled_cuts.py --out docs/measured/distilled_cuts.md

It takes about three minutes of two processors for each of its four runs.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

from compress_quality import Observed, measured, perplexities, written
from domains import DOMAINS, FOREIGN, parted, texts
from small_moe import BATCH, LENGTH, TOKENS, small_moe
from training_curves import cosine, run_recipe, write_domains

import upcycle

CALIBRATED = 16_384
RUNS: tuple[tuple[str, str, list[str] | None, float], ...] = (  # method, refit, what trains, rate
    ("reap", "none", ["router"], 1e-2),
    ("reap", "none", None, 1e-3),
    ("slim", "down", None, 1e-3),
    ("slim", "down", None, 3e-4),
)


def recipe(
    cut: Path, uncut: Path, run: Path, tokens: int, data: dict[str, Any], train: list[str] | None, rate: float
) -> dict[str, Any]:
    """The distillation."""
    steps = -(-tokens // (LENGTH * BATCH))
    learned = {"logits": 1.0, "next_token": 0.0, "parent": str(uncut)}
    stage = cosine(steps, rate, 20, distillation=learned, **({"train": train} if train else {}))
    often = {"validated": steps, "saved": steps, "export": True}
    return run_recipe(cut, data, stage, (LENGTH, BATCH), **often, output=str(run))


def main() -> int:
    """Cut, train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="of small_moe.py  [default: 8,000,000]")
    parser.add_argument("--tokens", type=int, default=65_536, help="of distillation  [default: 65,536]")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = small_moe(options.train_tokens)
    evaluation = texts((*DOMAINS, FOREIGN))[1]
    uncut, said = perplexities(model, evaluation), written(model, evaluation)[0]
    lines = [
        "| cut | refit | what trains | rate | perplexity, calibrated kinds | news | same next token |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = write_domains(work / "text", {domain: parted(domain) for domain in DOMAINS})
        out, run, observed = work / "out", work / "run", Observed.now(model, work, CALIBRATED)
        for method, refit, train, rate in RUNS:
            observed.cut(out, method=method, keep=options.keep, refit=refit)
            before = measured(out, uncut, said, evaluation)
            upcycle.train(recipe(out, model, run, options.tokens, data, train, rate), lambda _: None)
            after = measured(run / "model", uncut, said, evaluation)
            shutil.rmtree(run)
            numbers = (f"{math.exp(a):.3f}x to {math.exp(b):.3f}x" for a, b in zip(before[:2], after[:2], strict=True))
            parts = " and ".join(train) if train else "all"
            lines.append(
                f"| {method} | {refit} | {parts} | {rate:g} | {' | '.join(numbers)} | {before[3]:.1%} to {after[3]:.1%} |"
            )
            print(lines[-1], flush=True)
    if options.out:
        table = "\n".join(lines)
        options.out.write_text(
            f"""# Cuts distilled from the uncut model

A MoE of 16 experts, 4 per token, trained on {options.train_tokens:,} tokens, of which {options.keep:.0%} are left; trained on
{options.tokens:,} tokens towards the uncut model's next-token distributions alone. Relative to the uncut model.

{table}

    python -P tests/benchmarks/compressing/distilled_cuts.py --out docs/measured/distilled_cuts.md
""",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
