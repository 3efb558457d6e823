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

from compress_quality import measured, perplexities, written
from domains import DOMAINS, FOREIGN, parted, texts
from small_moe import BATCH, LENGTH, TOKENS, small_moe
from training_curves import write_domains

import upcycle
from upcycle.calibration.compressing.observe_file import observe

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
    stage: dict[str, Any] = {
        "steps": steps,
        "learning_rate": rate,
        "schedule": {"kind": "cosine", "warmup": max(1, steps // 20), "floor": 0.1},
        "distillation": {"logits": 1.0, "next_token": 0.0, "parent": str(uncut)},
    }
    return {
        "model": str(cut),
        "output": str(run),
        "data": {**data, "validation": {"tokens": 4096}},
        "length": LENGTH,
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "stages": {**stage, **({"train": train} if train else {})},
        "saving": {"every": steps, "keep": 1},
        "log": {"validation": steps},
    }


def main() -> int:
    """Cut, train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="of small_moe.py  [default: 8,000,000]")
    parser.add_argument("--tokens", type=int, default=65_536, help="of distillation  [default: 65,536]")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = small_moe(options.train_tokens)
    calibration, evaluation = texts()[0], texts((*DOMAINS, FOREIGN))[1]
    uncut, said = perplexities(model, evaluation), written(model, evaluation)[0]
    lines = [
        "| cut | refit | what trains | rate | perplexity, calibrated kinds | news | same next token |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        work, text = Path(folder), [str(path) for path in calibration]
        data = write_domains(work / "text", {domain: parted(domain) for domain in DOMAINS})
        seen, out, run = work / "seen.safetensors", work / "out", work / "run"
        observe(str(model), seen, ",".join(text), CALIBRATED)
        for method, refit, train, rate in RUNS:
            upcycle.convert(
                str(model),
                out,
                overwrite=True,
                method=method,
                keep=options.keep,
                refit=refit,
                observations=str(seen),
                calibration={"text": text, "tokens": CALIBRATED},
                verification={"enabled": False},
            )
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
