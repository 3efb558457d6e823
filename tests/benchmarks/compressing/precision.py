"""What storing the experts of a trained MoE in few bits loses, by width, by rounding and by allocation.

The model is ``small_moe.py``'s, or any MoE (``--model``). Calibrated on documentation, code and science; measured on other documents
of these kinds, and on news, a kind that nothing was calibrated on. Perplexities are relative to those of the model as it was; bytes
are those of the weight files.

Passes where 4 bits lose at most 3%, where GPTQ loses less than nearest rounding at every width, and where ``mixed:2.5`` loses less
than 2 and 3 bits in alternating layers, all on the calibrated kinds.

    python -P tests/benchmarks/compressing/precision.py --out docs/measured/precision_small_moe.md
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from compress_quality import perplexities
from domains import DOMAINS, FOREIGN, texts
from small_moe import TOKENS, small_moe

import upcycle

# bits, rounding, allocation
WAYS = (
    ("8", "nearest", "-"),
    ("fp8", "nearest", "-"),
    *((bits, rounding, "-") for bits in ("4", "3", "2") for rounding in ("nearest", "gptq")),
    *(("mixed:2.5", "gptq", way) for way in ("even", "first", "frequency", "outliers", "mc_moe", "layers")),
)
ALLOWED = 1.03  # of 4 bits


def main() -> int:
    """Measure, print, and say whether it passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the small model's training")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, help="write the table here, too")
    wanted = parser.parse_args()
    source = wanted.model or small_moe(wanted.tokens)
    calibration, evaluation = texts((*DOMAINS, FOREIGN))
    own = [str(path) for path in calibration if path.name.split(".")[0] != FOREIGN]
    before = perplexities(source, evaluation)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    results: dict[tuple[str, str, str], tuple[float, float]] = {}
    lines = [
        "| experts | rounding | allocation | bytes | calibrated | news | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits, rounding, allocation in WAYS:
        with tempfile.TemporaryDirectory() as work:
            out, started = Path(work) / "out", time.monotonic()
            precision = {"bits": bits, "rounding": rounding}
            precision |= {} if allocation == "-" else {"allocation": allocation}
            text = {"text": own, "tokens": wanted.calibration_tokens, "window": 256}
            upcycle.convert(
                str(source),
                out,
                method="quantize",
                precision=precision,
                calibration=text,
                verification={"enabled": False},
            )
            seconds = time.monotonic() - started
            found = perplexities(out, evaluation)
            part = sum(file.stat().st_size for file in out.glob("*.safetensors")) / size
        seen = math.exp(fmean(math.log(found[kind] / before[kind]) for kind in DOMAINS))
        foreign = found[FOREIGN] / before[FOREIGN]
        results[bits, rounding, allocation] = seen, foreign
        lines.append(
            f"| {bits} | {rounding} | {allocation} | {part:.0%} | {seen:.3f}x | {foreign:.3f}x | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    even, best = results["mixed:2.5", "gptq", "even"][0], results["mixed:2.5", "gptq", "layers"][0]
    checks = {
        f"4 bits by GPTQ within {ALLOWED}x": results["4", "gptq", "-"][0] <= ALLOWED,
        "mixed:2.5 below 2 and 3 bits in alternating layers": best < even,
        **{
            f"GPTQ below nearest rounding at {bits} bits": results[bits, "gptq", "-"][0]
            < results[bits, "nearest", "-"][0]
            for bits in ("2", "3", "4")
        },
    }
    lines += ["", *(f"- {what}: {'yes' if true else 'NO'}" for what, true in checks.items())]
    print("\n".join(lines))
    if wanted.out:
        wanted.out.write_text("\n".join(["# Few bits: what they lose", "", *lines, ""]), encoding="utf-8")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
