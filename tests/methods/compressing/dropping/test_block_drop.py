"""Block Drop: the layers that go are those of the largest cosines, and the result is the stock model without them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import moe_settings, text_of
from moe_oracle import layers_of, some_windows, stock
from pico_models import MOE_PARTS, PICO_MOE

import upcycle
from upcycle.architectures.kept_layers import config_of_layers
from upcycle.architectures.stock import build_config
from upcycle.architectures.stock_classes import stock_shapes
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.compressing.dropping.block_drop import dropped_layers

Models = Callable[..., Path]
LAYERS = 7
RULES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [0, 3], "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4},
    "qwen3_moe": {"decoder_sparse_step": 2},
    "qwen3_next": {"layer_types": ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 3},
    "qwen3_5_moe": {"layer_types": None, "full_attention_interval": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3 + ["mamba"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]},
    "qwen3_5_moe_text": {"layer_types": None, "full_attention_interval": 3},
    "cohere2_moe": {"layer_types": None, "sliding_window_pattern": 3, "first_k_dense_replace": 2},
    "cohere2_moe-sigmoid": {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3 + ["conv"], "num_dense_layers": 2},
    "granitemoe_swa": {"layer_rope_theta": [1e4, 5e3, 0, 1e4, 5e3, 0, 1e4]},
    "glm4_moe": {"first_k_dense_replace": 3},
    "dots1": {"first_k_dense_replace": 1, "sliding_window": 16, "max_window_layers": 3},
}


def described(name: str) -> MoeModel:
    """A model of seven layers, by its configuration alone."""
    model_type, changes = PICO_MOE[name]
    own = {**changes, "num_hidden_layers": LAYERS, **RULES.get(name, {})}
    own = {key: value for key, value in own.items() if value is not None or key not in RULES.get(name, {})}
    raw = {**moe_settings(model_type, own), "model_type": model_type}
    if model_type in MOE_PARTS:
        raw["text_config"]["model_type"] = f"{model_type}_text"
    specs = {key: TensorSpec(shape, "float32") for key, shape in stock_shapes(raw).items()}
    model = MoeModel.read(raw, specs, name)
    assert len(model.names) == LAYERS + 1
    return model


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", PICO_MOE)
def test_the_configuration_means_the_layers_that_stay(name: str) -> None:
    """Asked of stock transformers: every per-layer setting, and every tensor."""
    model, draw = described(name), random.Random(0)
    own: Any = text_of(build_config(model.raw, name))
    for _ in range(3):
        kept = sorted({*draw.sample(range(LAYERS), 3), draw.choice(model.moe_layers)})
        made: Any = text_of(build_config(config_of_layers(model, kept), name))
        assert made.num_hidden_layers == len(kept)
        for key in ("layer_types", "mlp_layer_types", "layer_rope_theta"):
            if getattr(own, key, None) is not None:
                assert list(getattr(made, key)) == [getattr(own, key)[layer] for layer in kept], key
        paths, whole = model.module_paths, stock_shapes(model.raw)
        expected = {key: shape for key, shape in whole.items() if paths.layer_of(key) is None}
        for place, layer in enumerate(kept):
            prefix = f"{paths.layer(layer)}."
            expected |= {
                f"{paths.layer(place)}.{key.removeprefix(prefix)}": shape
                for key, shape in whole.items()
                if key.startswith(prefix)
            }
        assert stock_shapes(config_of_layers(model, kept)) == expected
    assert config_of_layers(model, [*range(LAYERS)]) == model.raw


def streams(layers: int, seed: int) -> torch.Tensor:
    found = torch.rand(layers + 1, layers + 1, generator=torch.Generator().manual_seed(seed)).double()
    return (found + found.T) / 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [2, 4, 6])
def test_layers_of_the_largest_cosines_go(keep: int, seed: int) -> None:
    model, cosines = described("mixtral"), streams(LAYERS, seed)
    gone = max(
        itertools.combinations(range(LAYERS), LAYERS - keep),
        key=lambda layers: sum(float(cosines[layer, layer + 1]) for layer in layers),
    )
    assert dropped_layers(model, keep, cosines, "discrete") == list(gone)
    first = max(range(keep + 1), key=lambda first: float(cosines[first, first + LAYERS - keep]))
    assert dropped_layers(model, keep, cosines, "consecutive") == list(range(first, first + LAYERS - keep))


def test_layers_that_the_encoder_feeds_stay() -> None:
    """Features of images are added behind the first layers, by their numbers."""
    model, cosines = described("qwen3_vl_moe"), torch.ones(LAYERS + 1, LAYERS + 1).double()
    cosines[1:, 1:] -= 0.5  # the first layer changes least
    assert 0 not in dropped_layers(model, 3, cosines, "discrete")
    assert 0 in dropped_layers(described("mixtral"), 3, cosines, "discrete")


def test_layers_without_which_there_is_no_model_stay() -> None:
    """Whatever the cosines: one with experts, and one with attention where convolutions have none."""
    for name, seed, pick in itertools.product(("glm4_moe", "lfm2_moe"), range(5), ("discrete", "consecutive")):
        model = described(name)
        kinds: Any = getattr(build_config(model.raw, name), "layer_types", None) or ["full_attention"] * LAYERS
        for keep in (2, 3):
            left = set(range(LAYERS)) - set(dropped_layers(model, keep, streams(LAYERS, seed), pick))
            assert len(left) == keep
            assert left & set(model.moe_layers)
            assert any(kinds[layer] == "full_attention" for layer in left)
    needed = replace(described("glm4_moe"), layers=3)
    needed.__dict__["moe_layers"] = [1]  # cached
    with pytest.raises(UsageError, match="no run of 2 layers can be left out"):
        dropped_layers(needed, 1, streams(3, 0), "consecutive")


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", PICO_MOE)
def test_the_result_is_the_stock_model_without_the_layers(name: str, pico_moe: Models, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "calibration": {"text": "demo", "tokens": 256, "window": 32},
        "verification": {"tokens": 64},
    }
    source, out = pico_moe(name), tmp_path / "out"
    result = upcycle.convert(str(source), out, method="block_drop", keep=0.5, refit="none", **keys)
    content = json.loads((out / "compression.json").read_text())["experts"]
    (kept,) = [int(layer) for layer, found in content.items() if found["kept"]]
    assert result.plan.summary == "1 layers from 2"
    whole, made, windows = stock(source), stock(out), some_windows(2, 24)
    layers = layers_of(whole)
    getattr(whole.model, "language_model", whole.model).layers = torch.nn.ModuleList([layers[kept]])
    config = text_of(whole.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[kept]]
    with torch.no_grad():
        one, other = (model(windows, use_cache=False).logits for model in (whole, made))
    assert torch.dist(one, other) < 1e-10 * torch.linalg.norm(one)
    assert len(layers_of(made)) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"keep": 0.2}, "keep 0.2 of 2 decoder layers leaves 0, and 1 must stay"),
        ({"keep": 0.9}, "keep 0.9 of 2 decoder layers leaves 2"),
        ({}, "block_drop needs to know how many decoder layers stay"),
    ],
)
def test_what_cannot_be_kept_is_refused(keys: dict[str, Any], said: str, pico_moe: Models) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        upcycle.plan(str(pico_moe("mixtral")), method="block_drop", calibration={"text": "demo"}, **keys)
    assert "--keep" in (caught.value.hint or "")
