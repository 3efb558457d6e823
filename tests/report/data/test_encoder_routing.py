"""What a report shows of encoders' routers, against the routers of stock models."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import image_encoder, image_folder, text_encoder
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import upcycle
import upcycle.models
from upcycle.models.own.moe_block import MoeBlock
from upcycle.report.collect import Wanted
from upcycle.report.drawing.patches import colour_of
from upcycle.report.write_report import write_report

SPLIT: dict[str, Any] = {"method": "random_split", "experts": 8, "top_k": 3, "router": {"name": "random"}}


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_patches_have_the_colours_of_their_experts(tmp_path: Path) -> None:
    image_encoder("vit", tmp_path / "dense")
    images = image_folder(tmp_path / "images", each=3)
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **SPLIT)
    report = write_report(tmp_path / "out", wanted=Wanted(images=str(images)))
    patches = report.data["routing"]["patches"]
    assert patches["layers"] == [0, 1]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    routed: list[torch.Tensor] = []
    for block in (module for module in model.modules() if isinstance(module, MoeBlock)):
        block.router.register_forward_hook(lambda _, __, output: routed.append(output[0].argmax(-1)))
    page = report.html.read_text()
    drawn = re.findall(r'<div class="patches">(.*?)</div>', page, re.DOTALL)
    assert len(drawn) == len(patches["images"]) == 4
    for image, part in zip(patches["images"], drawn, strict=True):
        routed.clear()
        with torch.no_grad():
            model(**processor(images=Image.open(images / image["name"]), return_tensors="pt"))
        expected = [experts[1:].view(2, 2).tolist() for experts in routed]  # behind the class token
        assert image["experts"] == expected
        picture, *grids = re.findall(r'src="(data:image/png[^"]*)"', part)
        assert opened(picture).size == (8, 8)
        assert opened(picture).getpixel((3, 5)) == tuple(image["pixels"][5][3])
        for grid, experts in zip(grids, expected, strict=True):
            assert opened(grid).getpixel((1, 0)) == colour_of(experts[0][1])
    assert report.data["routing"]["domains"] == ["class_0", "class_1"]
    assert report.data["routing"]["tokens"] == 6 * 5


def test_without_images_the_report_says_how_to_name_them(tmp_path: Path) -> None:
    image_encoder("vit", tmp_path / "dense")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **SPLIT)
    assert "--images FOLDER" in write_report(tmp_path / "out").data["routing"]["missing"]


@pytest.mark.long
@pytest.mark.parametrize("tokens", [64, 2048])
def test_an_encoder_of_text_shows_its_routing(tokens: int, tmp_path: Path) -> None:
    text_encoder("bert", tmp_path / "dense")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **SPLIT)
    report = write_report(tmp_path / "out", wanted=Wanted(tokens=tokens))
    routing = report.data["routing"]
    assert routing["domains"] == ["prose", "code"] or routing["domains"] == ["code", "prose"]
    assert routing["tokens"] == 2 * tokens
    assert [sum(layer["counts"]) for layer in routing["layers"]] == [3 * routing["tokens"]] * 2
    assert "what it is for" in report.data["quality"]["missing"]
