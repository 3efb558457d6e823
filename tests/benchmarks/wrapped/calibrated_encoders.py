"""Splits two real encoders with calibrated routers and fitted experts, by the commands, and measures what is lost and gained.

- all-MiniLM-L6-v2 (see ``real_encoders.py``): about 20, 40 and 60% of its neurons, calibrated on three quarters of the embedded texts.
  Cosine and recall@10 are those of ``upcycle evaluate``, on sentences that were not calibrated on; times are of embedding 256.
- The vision transformer of handwritten digits (``tests/benchmarks/support/digits_vit.py``): a half, a quarter and an eighth of its
  neurons, calibrated on the images that it was trained on; accuracy on the others.

The same splits without calibration stand beside them. ``encoder_rules.py`` has the rules of MoEfication and D2DMoE.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)),
]

import torch
from digits_vit import digits, digits_vit
from measure import UPCYCLE, Row, report
from real_encoders import minilm, sentences

from upcycle.architectures.stock import load_tokenizer
from upcycle.evaluation.encoders.embeddings import embed_texts
from upcycle.models.load import load_model
from upcycle.progress import SILENT

EXPERTS, ACTIVE = 24, (5, 10, 14)  # of 64 neurons: 21, 42 and 58%
DIGITS = (4, 2, 1)  # of 8
ROUNDS, TIMED = 5, 256
CALIBRATED = ("--method", "coactivation_kmeans", "--router", "ridge", "--refit", "down")
TEXT = ("--calibration", "demo", "--calibration-tokens", "32768", "--set", "calibration.window=64")
PLAIN = ("--method", "random_split")
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "image_mean": [0.5],
    "image_std": [0.5],
}


def run(*arguments: Any) -> str:
    """Run the command; return what it prints."""
    done = subprocess.run([*map(str, (UPCYCLE, *arguments))], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stderr}")
    return done.stdout


def convert(source: Path, out: Path, experts: int, top_k: int, *options: str) -> None:
    """Convert by the command."""
    run("convert", source, out, "--target", "upcycle_moe", "--quiet", "--experts", experts, "--top-k", top_k, *options)


def evaluation(out: Path, reference: Path, *options: Any) -> dict[str, Any]:
    """Evaluate by the command."""
    found: dict[str, Any] = json.loads(run("evaluate", out, "--reference", reference, "--quiet", "--json", *options))
    return found


def seconds(folders: Sequence[Path]) -> list[float]:
    """The least time that embedding the sentences takes each model, of several rounds in turns."""
    texts, tokenizer = sentences()[:TIMED], load_tokenizer(minilm())
    models = [load_model(folder, experts="auto", encoder=True) for folder in folders]
    best = [float("inf")] * len(models)
    for _ in range(ROUNDS):
        for i, model in enumerate(models):
            started = time.perf_counter()
            embed_texts(model, tokenizer, texts, 512, False, SILENT)
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def image_folders(place: Path) -> tuple[Path, Path]:
    """The digits as image files, those to calibrate on and those held out, in a folder per class."""
    from PIL import Image

    folders = place / "train", place / "held"
    for folder, (images, labels) in zip(folders, digits(), strict=True):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = folder / str(int(label)) / f"{i:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()).save(file)
    return folders


def digit_rows(place: Path) -> list[Row]:
    """A half, a quarter and an eighth of the neurons of the digits' model."""
    train, held = image_folders(place)
    source = place / "vit"
    shutil.copytree(digits_vit(), source)
    (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    rows = []
    for top_k in DIGITS:
        for name, options in (("calibrated", (*CALIBRATED, "--calibration", str(train))), ("not calibrated", PLAIN)):
            out = place / f"{name}-{top_k}"
            convert(source, out, 8, top_k, *options)
            found = evaluation(out, source, "--images", held)["classes"]
            accuracy, dense = f"{found['accuracy']:.2%}", f"{found['reference_accuracy']:.2%}"
            same = f"same class for {found['agreement']:.2%}"
            rows.append(Row(f"digits ViT, {top_k} of 8, {name}: accuracy", accuracy, dense, same, ""))
    return rows


def main() -> int:
    """Convert and measure; returns the exit code."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        rows += digit_rows(Path(place) / "digits")
        folders = {}
        for top_k in ACTIVE:
            for name, options in (("calibrated", (*CALIBRATED, *TEXT)), ("not calibrated", PLAIN)):
                folders[top_k, name] = out = Path(place) / f"{name}-{top_k}"
                convert(minilm(), out, EXPERTS, top_k, *options)
        timed = [folders[top_k, "calibrated"] for top_k in ACTIVE]
        dense, *found = seconds([minilm(), *timed])
        times = dict(zip(ACTIVE, found, strict=True))
        measured = {key: evaluation(out, minilm())["embeddings"] for key, out in folders.items()}
        for (top_k, name), scores in measured.items():
            passed = None
            if name == "calibrated":
                plain = measured[top_k, "not calibrated"]
                passed = scores["cosine"] > plain["cosine"] and scores["recall"] > plain["recall"]
            label = f"MiniLM, {top_k} of {EXPERTS} ({top_k / EXPERTS:.0%}), {name}"
            rows.append(
                Row(
                    f"{label}: cosine, recall@10",
                    f"{scores['cosine']:.4f}, {scores['recall']:.1%}",
                    "1.0000, 100.0%",
                    f"{times[top_k] / dense:.2f}x the time" if name == "calibrated" else "",
                    "more than not calibrated" if passed is not None else "",
                    passed,
                )
            )
    title = f"encoders split with calibration; dense MiniLM embeds {TIMED} sentences in {dense:.2f} s"
    return report(title, ("MoE", "dense"), rows)


if __name__ == "__main__":
    sys.exit(main())
