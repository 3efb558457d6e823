"""MoEs inside models of parts: encoders are copied byte for byte, and images mean to the result what they meant to the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import auto_class_of
from moe_oracle import stock, without_experts
from pico_models import MOE_PARTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tower_runs import with_image

import upcycle
from upcycle.calibration.compressing.experts_in_files import layers_with_experts_in_files
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import RefusalError

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
QUICK: dict[str, Any] = {"keep": 0.75, "calibration": TEXT, "verification": {"tokens": 64}}
CELLS = [(name, fused) for name in MOE_PARTS for fused in (False, True)]


def seen(folder: Path, name: str) -> torch.Tensor:
    """Logits of a text with an image, by the stock class in fp64."""
    model = stock(folder)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in with_image(model, name).items()}
    with torch.no_grad():
        return torch.as_tensor(model(**inputs).logits)


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor outside the text model."""
    found = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if ".language_model." not in name:
                found[name] = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "fused"), CELLS)
def test_keeping_all_gives_the_same_logits_with_an_image(
    name: str, fused: bool, pico_moe: Models, tmp_path: Path
) -> None:
    source, out = pico_moe(name, fused), tmp_path / "out"
    found = upcycle.convert(str(source), out, method="reap", keep=1.0, verification={"tokens": 64}).verification
    assert found is not None
    assert (found.verdict, found.media_error) == ("exact", 0.0)
    assert "random image" in found.media
    assert torch.equal(seen(out, name), seen(source, name))
    assert stored(out) == stored(source)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "fused"), CELLS)
def test_a_cut_leaves_the_encoder_and_is_the_stock_model_without_the_experts(
    name: str, fused: bool, pico_moe: Models, tmp_path: Path
) -> None:
    source, out = pico_moe(name, fused), tmp_path / "out"
    result = upcycle.convert(str(source), out, method="frequency", refit="none", **QUICK)
    assert any("text alone" in warning for warning in result.plan.warnings)
    assert result.verification is not None
    assert (result.verification.media_error or 0) > 1e-4
    assert stored(out) == stored(source)
    assert any("visual" in each for each in stored(out))
    cuts = json.loads((out / "compression.json").read_text())["experts"]
    kept = {int(layer): cut["rows"] for layer, cut in cuts.items()}
    smaller = without_experts(stock(source), source, kept)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in with_image(smaller, name).items()}
    with torch.no_grad():
        expected = smaller(**inputs).logits
        blind = smaller(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert torch.dist(seen(out, name), expected) < 1e-9 * torch.linalg.norm(expected)
    assert torch.dist(blind, expected) > 1e-3 * torch.linalg.norm(expected)  # the image matters
    model, loading = auto_class_of(out).from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 7)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("method", ["m_smoe", "slim", "low_rank", "layer_drop"])
def test_experts_stored_either_way_round_give_the_same(method: str, pico_moe: Models, tmp_path: Path) -> None:
    for fused in (False, True):  # as published, and as transformers holds them
        refit = {"refit": "none"} if method == "low_rank" else {}
        keys = {**QUICK, "keep": 0.5, "verification": {"enabled": False}, **refit}
        upcycle.convert(str(pico_moe("qwen3_vl_moe", fused)), tmp_path / str(fused), method=method, **keys)
    one, two = (auto_class_of(tmp_path / each).from_pretrained(tmp_path / each) for each in ("False", "True"))
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(own, theirs) for (name, own), (other, theirs) in pairs)


@pytest.mark.parametrize("name", MOE_PARTS)
def test_the_encoder_is_not_in_memory_while_text_is_observed(name: str, pico_moe: Models) -> None:
    layers = layers_with_experts_in_files(MoeCheckpoint.open(str(pico_moe(name))), "keep")
    parts = dict(layers.model.named_parameters())
    assert all(
        part.is_meta == (".visual." in key or key == "lm_head.weight")
        for key, part in parts.items()
        if ".layers." not in key
    )


def test_a_changed_encoder_is_found(pico_moe: Models, tmp_path: Path) -> None:
    """What the verification says of images can be red."""
    from upcycle.models.stock_model import folder_model
    from upcycle.registry import load
    from upcycle.verification.media import compare_media

    source = pico_moe("qwen3_vl_moe")
    other = shutil.copytree(source, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    victim = next(name for name in tensors if "visual.merger" in name and name.endswith("fc2.weight"))
    save_file({**tensors, victim: -tensors[victim]}, other / "model.safetensors", {"format": "pt"})
    models = [folder_model(folder, False) for folder in (source, other)]
    found = compare_media(models[0], models[1], load("wrapper", "qwen3_vl_moe"), source, 0)
    assert (found.error or 0) > 1e-3


@pytest.mark.long
def test_layers_that_predict_further_are_left_out_as_the_class_does(pico_moe: Models, tmp_path: Path) -> None:
    source = shutil.copytree(pico_moe("qwen3_5_moe"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": torch.ones(3, 2)}, source / "model.safetensors", {"format": "pt"})
    assert "mtp.fc.weight" not in MoeCheckpoint.open(str(source)).store.specs
    result = upcycle.convert(str(source), tmp_path / "out", method="reap", **QUICK)
    plain = upcycle.convert(str(pico_moe("qwen3_5_moe")), tmp_path / "plain", method="reap", **QUICK)
    assert result.verification == plain.verification
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("keys", [{"method": "to_dense"}, {"method": "reap", "target": "upcycle_moe"}])
def test_what_is_made_of_text_models_alone_is_refused(keys: dict[str, Any], pico_moe: Models) -> None:
    with pytest.raises(RefusalError, match="a 'qwen3_5_moe' model has other parts beside its text model"):
        upcycle.plan(str(pico_moe("qwen3_5_moe")), **keys, **QUICK)
