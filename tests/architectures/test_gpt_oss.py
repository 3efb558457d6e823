"""What GPT-OSS's target says and refuses beyond the contract of targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pico_models import COMMON, PICO

import upcycle
from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.softmax.gpt_oss import GptOss
from upcycle.errors import RefusalError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.registry import load

SHAPE = MoeShape(4, 2, 0, 96, (0, 1, 2))


def dense(**changes: object) -> DenseConfig:
    model_type, different = PICO["llama-mlp-bias"]
    config: DenseConfig = load("family", model_type)().config({**COMMON, **different, "model_type": model_type})
    return replace(config, **changes)  # type: ignore[arg-type]


def test_the_clamp_is_never_reached_and_each_dtype_has_such_a_number() -> None:
    clamps = {dtype: GptOss().full_config(dense(), SHAPE, dtype)["swiglu_limit"] for dtype in ("float32", "float16")}
    assert clamps == {"float32": 1e30, "float16": 65504.0}


@pytest.mark.parametrize(("activation", "gain"), [("silu", 1.0), ("swish", 1.0), ("quick_gelu", 1.702)])
def test_activations_that_are_a_product_with_a_sigmoid_are_held(activation: str, gain: float) -> None:
    config = dense(hidden_act=activation)
    assert not GptOss().lacks(config)
    assert GptOss().config(config, SHAPE)["swiglu_alpha"] == gain


def test_others_are_refused_by_name(tmp_path: Path, dense_maker: Callable[..., Path]) -> None:
    assert GptOss().lacks(dense(hidden_act="gelu")) == [Feature.ACTIVATION]
    folder = dense_maker(tmp_path / "dense", "llama", hidden_act="gelu", mlp_bias=True)
    with pytest.raises(RefusalError, match=r"an activation that is not SiLU \(hidden_act gelu\)"):
        upcycle.convert(str(folder), tmp_path / "out", target="gpt_oss", experts=2)


def test_biases_in_the_ffn_choose_it_and_the_plan_says_where_it_runs(pico: Callable[[str], Path]) -> None:
    plan = upcycle.plan(str(pico("llama-mlp-bias")), experts=2)
    assert plan.target == "gpt_oss"
    assert any("other engines take GPT-OSS's own" in warning for warning in plan.warnings)


def test_the_window_that_the_class_asks_for_is_no_layers(pico: Callable[[str], Path], tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama-mlp-bias")), tmp_path / "out", experts=2, verification={"tokens": 64})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 3
    assert config["sliding_window"] == config["max_position_embeddings"]
