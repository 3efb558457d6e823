"""Splits models of two inputs that learned something: T5, CLIP and Whisper, small and trained by ``trained_towers.py``.

Every FFN of 256 neurons becomes 8 experts, of which 6, 4, 2 or 1 run, with ``coactivation_kmeans``, ridge routers and fitted down
projections, calibrated on what the model was trained on; beside it the same split at random, not calibrated. Numbers are those of
``upcycle.evaluate`` on examples that were not trained on: the loss of the decoder in nats per character, or recall of captions.

    python -P tests/benchmarks/wrapped/tower_splits.py --out docs/measured/tower_splits.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "support"),
    str(Path(__file__).resolve().parents[1] / "training"),
]

from trained_towers import trained_tower
from training_curves import write_page

import upcycle

EXPERTS, RUNNING = 8, (8, 6, 4, 2, 1)
CALIBRATED = {"method": "coactivation_kmeans", "router": "ridge", "refit": "down"}
PLAIN = {"method": "random_split"}
COLUMNS = {"column": "short", "target": "line"}
TITLES = {
    "restorer": ("T5: lines of the embedded prose, read without their vowels", "nats per character"),
    "dialled": ("Whisper: one to four telephone tones in noise", "nats per character"),
    "four_digits": ("CLIP: images of four handwritten digits", "recall@1 of captions, of images"),
}


def sources(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model is calibrated on and evaluated on, as the functions take them."""
    if name == "restorer":
        return {"text": str(folder / "train.jsonl"), **COLUMNS}, {"text": str(folder / "held.jsonl"), **COLUMNS}
    return {"text": str(folder / "train")}, {"images" if name == "four_digits" else "text": str(folder / "held")}


def found(result: Any, reference: bool = False) -> tuple[float, str]:
    """What is compared (more is worse), and how it is told."""
    if pairs := result.retrieval:
        sides = (
            (pairs.reference_image_to_text, pairs.reference_text_to_image)
            if reference
            else (pairs.image_to_text, pairs.text_to_image)
        )
        return -sides[0][0], ", ".join(f"{side[0]:.1%}" for side in sides)
    (text,) = result.texts
    loss = text.reference_nats_per_token if reference else text.nats_per_token
    return loss, f"{loss:.4f}"


def main() -> int:
    """Split, measure and print the tables; with ``--out`` they are written. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts, wrong = [], []
    for name in options.models:
        folder = trained_tower(name)
        read, held = sources(name, folder)
        title, unit = TITLES[name]
        lines = [f"| experts that run | neurons | {unit} | not calibrated |", "|---|---:|---:|---:|"]
        dense = ""
        for top_k in RUNNING:
            cells, worse = [], []
            for recipe in (CALIBRATED, PLAIN):
                keys: dict[str, Any] = {**recipe, "experts": EXPERTS, "top_k": top_k, "target": "upcycle_moe"}
                if recipe is CALIBRATED:
                    keys["calibration"] = {**read, "tokens": 16384}
                if top_k == EXPERTS:
                    keys = {**PLAIN, "experts": EXPERTS, "top_k": top_k, "target": "upcycle_moe"}
                with tempfile.TemporaryDirectory() as place:
                    upcycle.convert(str(folder), Path(place) / "moe", verification={"enabled": False}, **keys)
                    result = upcycle.evaluate(Path(place) / "moe", reference=folder, **held)
                value, told = found(result)
                dense = found(result, reference=True)[1]
                cells.append(told)
                worse.append(value)
            if top_k == EXPERTS and cells[0] != dense:
                wrong.append(f"{name}: all experts give {cells[0]}, the dense model {dense}")
            if worse[0] > worse[1]:
                wrong.append(f"{name}: {top_k} experts are worse calibrated than not")
            lines.append(f"| {top_k} of {EXPERTS} | {top_k / EXPERTS:.1%} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
        parts.append(f"## {title}\n\nThe dense model: {dense}.\n\n" + "\n".join(lines) + "\n")
    said = "\n".join(parts)
    print(said, *wrong, sep="\n")
    if options.out:
        write_page(options.out, "Models of two inputs", "wrapped/tower_splits.py", said)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
