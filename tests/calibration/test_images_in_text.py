"""Calibration of all parts of a vision-language model on images in texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import image_folder
from media_cases import captioned_images, with_processor
from pico_towers import make_tower
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import upcycle
import upcycle.models
from upcycle.errors import EnvironmentFault, UsageError

pytestmark = pytest.mark.long

SPLIT: dict[str, Any] = {"method": "coactivation_kmeans", "experts": 4, "top_k": 2, "verification": {"tokens": 64}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_processor(make_tower(tmp_path_factory.mktemp("llava"), "llava", "llama", vocab_size=4104))


@pytest.mark.parametrize(("part", "layers"), [("vision", [3, 4, 5]), ("all", list(range(7))), ("connector", [6])])
def test_a_fit_halves_the_error_on_images_that_were_held_out(
    part: str, layers: list[int], source: Path, tmp_path: Path
) -> None:
    images = captioned_images(tmp_path / "images", 20)
    found = {}
    for refit in ("down", "none"):
        keys = {**SPLIT, "part": part, "refit": refit, "calibration": {"text": str(images), "tokens": 1024}}
        found[refit] = upcycle.convert(str(source), tmp_path / refit, **keys)
    fitted, plain = (found[refit].verification for refit in ("down", "none"))
    assert [report["layer"] for report in found["down"].layers] == layers
    assert all(report["error_after"] < report["error_before"] for report in found["down"].layers)
    assert fitted.media == plain.media
    assert fitted.media.endswith("texts with images that were held out of the calibration")
    assert fitted.media_error < 0.7 * plain.media_error
    record = json.loads((tmp_path / "down" / "upcycle.json").read_text())["calibration"]
    assert record["images"] > 20
    assert record["held_out"]["images"].endswith("of 40 images")
    # The number is that of the stock class on an image and text that it makes itself.
    held = [path for path in sorted(images.rglob("*.png")) if _held_out(path)]
    assert held
    processor = AutoProcessor.from_pretrained(source)
    dense, moe = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (source, tmp_path / "down")
    )
    error = norm = 0.0
    for path in held[:8]:
        text = f"<image>\n{path.with_suffix('.txt').read_text()}"
        inputs = processor(text=[text], images=[Image.open(path).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            one, other = (model(**inputs).logits.double() for model in (dense, moe))
        error += (one - other).square().sum().item()
        norm += one.square().sum().item()
    assert fitted.media_error == pytest.approx((error / norm) ** 0.5, rel=0.2)  # the order of the images is another


def _held_out(path: Path) -> bool:
    import hashlib

    return int(hashlib.sha256(path.read_bytes()).hexdigest()[:12], 16) % 8 == 0


def test_what_is_wrong_is_said(source: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {**SPLIT, "part": "vision"}
    with pytest.raises(UsageError, match="prose is no source for a model that reads images in text"):
        upcycle.convert(str(source), tmp_path / "out", **keys, calibration={"text": "prose", "tokens": 256})
    bare = make_tower(tmp_path / "bare", "llava", "llama")
    images = image_folder(tmp_path / "images", each=4)
    with pytest.raises(EnvironmentFault, match=r"the processor in .* cannot be loaded"):
        upcycle.convert(str(bare), tmp_path / "out", **keys, calibration={"text": str(images), "tokens": 256})
