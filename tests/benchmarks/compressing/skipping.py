"""Experts left out token by token: what NAEE's rule and ODP's protection of tokens and layers lose, beside a lower top-k.

The model is ``small_moe.py``'s (16 experts, 4 per token), the measures are those of ``compress_quality.py``. All run as many experts
in the mean of the calibration text: three quarters, or half, of the four.

    python -P tests/benchmarks/compressing/skipping.py --out docs/measured/skipping.md
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from compress_quality import Observed, measured, perplexities, written
from domains import DOMAINS, FOREIGN, texts
from small_moe import TOKENS, small_moe

CALIBRATED = 16_384
PROTECT, LAYERS = 0.02, 4
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "`lower_top_k`": ("lower_top_k", {}),
    "`skip` (NAEE)": ("skip", {}),
    "`skip`, `weights=kept`": ("skip", {"weights": "kept"}),
    f"`skip`, `protect={PROTECT}`": ("skip", {"protect": PROTECT}),
    f"`skip`, `layers={LAYERS}`": ("skip", {"layers": LAYERS}),
    f"`skip`, `protect={PROTECT}`, `layers={LAYERS}` (ODP)": ("skip", {"protect": PROTECT, "layers": LAYERS}),
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="of small_moe.py  [default: 8,000,000]")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = small_moe(options.train_tokens)
    evaluation = texts((*DOMAINS, FOREIGN))[1]
    uncut, said = perplexities(model, evaluation), written(model, evaluation)[0]
    lines = [
        "| experts run | rule | perplexity, calibrated kinds | news | same continuation | same next token |",
        "|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        out, observed = Path(folder) / "out", Observed.now(model, Path(folder), CALIBRATED)
        for keep in options.keep:
            for name, (method, parameters) in WAYS.items():
                if "layers" in parameters and keep <= 1 - LAYERS / 6 * 3 / 4:
                    continue  # the other layers keep all, and the first expert always runs
                target = "upcycle_moe" if method == "skip" else "auto"
                observed.cut(out, method=method, keep=keep, parameters=parameters, target=target, refit="none")
                seen_kinds, news, same, following = measured(out, uncut, said, evaluation)
                lines.append(
                    f"| {keep:.0%} | {name} | {math.exp(seen_kinds):.3f}x | {math.exp(news):.3f}x | {same:.1%} | {following:.1%} |"
                )
                print(lines[-1], flush=True)
    table = "\n".join(lines)
    page = f"""# Experts left out token by token

Of a MoE of 16 experts, 4 per token, trained on {options.train_tokens:,} tokens; calibrated on {CALIBRATED:,} tokens of
{", ".join(DOMAINS)}; without a refit. Perplexities are relative to the uncut model's. ODP (Huang et al. 2024, arXiv 2410.06270)
protects {PROTECT:.0%} of the tokens; where it is said, {LAYERS} of six layers leave experts out, and more of them.

{table}

    python -P tests/benchmarks/compressing/skipping.py --out docs/measured/skipping.md
"""
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
