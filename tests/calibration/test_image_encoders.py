"""Calibration of encoders of images against stock transformers, on folders of images and on datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_cases import image_encoder, image_folder
from PIL import Image
from torch.nn.functional import linear
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.activations import ACT2FN

import upcycle
import upcycle.models
from upcycle.errors import CheckpointError, UsageError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.images import sources
from upcycle.images.sources import read_images
from upcycle.publishing.model_card import make_card
from upcycle.recipe.recipe_parts import CalibrationRecipe

E, K = 8, 3


def recipe(images: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "method": "random_split",
        "experts": E,
        "top_k": K,
        "calibration": {"text": str(images), "tokens": 200, **changes},
    }


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_refit_is_the_least_squares_solution_on_what_stock_encoders_see(name: str, tmp_path: Path) -> None:
    model, images, out = image_encoder(name, tmp_path / "dense"), image_folder(tmp_path / "images"), tmp_path / "out"
    keys = recipe(images, mode="parallel")
    result = upcycle.convert(str(tmp_path / "dense"), out, **keys)
    states = 5 + (name == "deit")
    chosen = read_images(CalibrationRecipe(**keys["calibration"]), 200 // states).read
    processor = AutoImageProcessor.from_pretrained(tmp_path / "dense")
    opened = [Image.open(item.path) for item in chosen]
    pixels = processor(images=opened, return_tensors="pt")["pixel_values"]
    record = json.loads((out / "upcycle.json").read_text())["calibration"]
    assert (record["images"], record["tokens"]) == (len(chosen), len(chosen) * states)
    xs: list[torch.Tensor] = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, a: xs.append(a[0])) for layer in model.base_model.layers]
    with torch.no_grad():
        model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    for index, report in enumerate(result.layers):
        blueprint = BlueprintFile(out / "blueprint.safetensors").layer(index)
        ffn, x = model.base_model.layers[index].mlp.double(), xs[index].double().flatten(0, 1)
        with torch.no_grad():
            hidden, target = ACT2FN[model.config.hidden_act](ffn.fc1(x)), ffn(x) - ffn.fc2.bias
        assert blueprint.router is not None
        assert blueprint.down is not None
        on = torch.zeros(len(x), E).double()
        on.scatter_(1, linear(x, blueprint.router.double()).topk(K, dim=1).indices, 1.0)
        active = (hidden[:, blueprint.neurons] * on.repeat_interleave(blueprint.intermediate_size, dim=1)).numpy()
        columns = ffn.fc2.weight.detach()[:, blueprint.neurons].numpy()
        gram = active.T @ active
        ridge = report["strength"] * gram.diagonal().mean() * np.eye(len(gram))
        pull = (target.numpy() - active @ columns.T).T @ active
        left = pull - (blueprint.down.double().numpy() - columns) @ (gram + ridge)
        assert np.linalg.norm(left) <= 1e-3 * np.linalg.norm(pull)
    assert result.verification is not None
    assert result.verification.text == "what was held out of the calibration images"


def test_the_result_is_measured_on_images_that_were_not_calibrated_on(tmp_path: Path) -> None:
    model, images, out = image_encoder("vit", tmp_path / "dense"), image_folder(tmp_path / "images"), tmp_path / "out"
    keys = recipe(images)
    found = upcycle.convert(str(tmp_path / "dense"), out, **keys).verification
    assert found is not None
    parts = read_images(CalibrationRecipe(**keys["calibration"]), 40)
    assert not {item.sha256 for item in parts.read} & {item.sha256 for item in parts.held_out}
    assert found.tokens == len(parts.held_out)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "dense")
    pixels = processor(images=[Image.open(i.path) for i in parts.held_out], return_tensors="pt")["pixel_values"]
    moe = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        one, other = (each.base_model(pixel_values=pixels).last_hidden_state for each in (model, moe))
    assert found.relative_logit_error == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-3)
    assert found.cosine == pytest.approx(torch.cosine_similarity(one, other, dim=-1).mean().item(), rel=1e-4)
    card = make_card(out, "out")
    assert f"({len(parts.read)} images)" in card
    assert f"on {found.tokens} images of" in card
    assert f"- mean cosine of the hidden states: {found.cosine:.4f}" in card
    assert "Perplexity" not in card
    named = upcycle.verify(out, text=str(images / "class_1"))
    assert (named.tokens, named.text) == (24, f"{images / 'class_1'}: images")


def test_images_of_other_modes_are_converted(tmp_path: Path) -> None:
    image_encoder("vit", tmp_path / "dense")
    for mode in ("RGBA", "L", "P"):
        images = image_folder(tmp_path / mode, mode=mode)
        found = upcycle.convert(str(tmp_path / "dense"), tmp_path / f"out-{mode}", **recipe(images)).verification
        assert found is not None
        assert found.text == "what was held out of the calibration images"
    image_encoder("vit", tmp_path / "grey", num_channels=1)
    found = upcycle.convert(str(tmp_path / "grey"), tmp_path / "out", **recipe(images)).verification
    assert found is not None
    assert found.text == "what was held out of the calibration images"


def test_a_model_whose_calibration_images_are_gone_is_verified_on_random_ones(tmp_path: Path) -> None:
    image_encoder("vit", tmp_path / "dense")
    images = image_folder(tmp_path / "images")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **recipe(images))
    images.rename(tmp_path / "elsewhere")
    assert upcycle.verify(tmp_path / "out").text == "random images"


def test_a_dataset_is_read_by_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_encoder("vit", tmp_path / "dense")
    files = sorted(image_folder(tmp_path / "images").rglob("*.png"))
    rows = [{"picture": Image.open(path), "label": 0} for path in files]
    monkeypatch.setattr(sources, "hub_rows", lambda name: iter(rows))
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **recipe("some/set", column="picture"))
    assert result.verification is not None
    assert result.verification.text == "what was held out of the calibration images"
    with pytest.raises(UsageError, match=r"no image in column 'image'; the columns are \['label', 'picture'\]"):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "other", **recipe("some/set"))


def test_what_is_wrong_with_images_is_said(tmp_path: Path) -> None:
    image_encoder("vit", tmp_path / "dense")
    images = image_folder(tmp_path / "images")

    def fails(error: type[Exception], message: str, source: Path | str = images, dense: str = "dense") -> None:
        with pytest.raises(error, match=message):
            upcycle.convert(str(tmp_path / dense), tmp_path / "out", **recipe(source))

    fails(UsageError, "there is no folder prose, and this model reads images", "prose")
    fails(UsageError, "has no images: no .png", tmp_path / "dense")
    (images / "class_0" / "003.png").write_bytes(b"\x89PNG nothing")
    fails(UsageError, r"class_0/003\.png: the image cannot be read")
    (images / "class_0" / "003.png").unlink()
    settings = json.loads((tmp_path / "dense" / "preprocessor_config.json").read_text())
    small = {**settings, "size": {"height": 4, "width": 4}}
    (tmp_path / "dense" / "preprocessor_config.json").write_text(json.dumps(small))
    fails(CheckpointError, r"makes images of \[3, 4, 4\], and the model reads \[3, 8, 8\]")
    (tmp_path / "dense" / "preprocessor_config.json").unlink()
    fails(UsageError, "has no preprocessor_config.json")
