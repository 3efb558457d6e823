"""A rotary embedding of a part of each head, written as one of whole heads: its frequencies are the stock class's to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico_models import COMMON, PICO
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

import upcycle
from upcycle.architectures.rope import can_be_masked, masked_rope, rope_parameters
from upcycle.registry import load

LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "attention_factor": 1.0,
    "short_factor": [1 + i / 7 for i in range(48)],
    "long_factor": [1 + i * 1.3 for i in range(48)],
}
SIZES = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 131072}


@pytest.mark.parametrize("theta", [10000.0, 1234567.0])
@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, LONG])
@pytest.mark.parametrize("length", [100, 5000])
def test_frequencies_are_equal_to_the_last_bit(theta: float, scaling: dict[str, Any], length: int) -> None:
    raw = {"rope_parameters": {**scaling, "rope_theta": theta, "partial_rotary_factor": 0.75}, **SIZES}
    raw["original_max_position_embeddings"] = 4096
    read = rope_parameters(raw, context=131072)
    assert can_be_masked(read, 131072)
    whole = masked_rope(read, 128, 131072)
    dense = Phi3RotaryEmbedding(AutoConfig.for_model("phi3", **raw))
    moe = MixtralRotaryEmbedding(
        AutoConfig.for_model(
            "mixtral", **SIZES, head_dim=128, rope_parameters=whole, original_max_position_embeddings=4096
        )
    )
    x, positions = torch.zeros(1), torch.arange(length)[None]
    (cos, sin), (wide_cos, wide_sin) = dense(x, positions), moe(x, positions)
    assert torch.equal(moe.inv_freq[:48], dense.inv_freq)
    assert torch.equal(wide_cos[..., :48], cos[..., :48])
    assert torch.equal(wide_sin[..., :48], sin[..., :48])
    assert torch.equal(wide_cos[..., 48:64], torch.ones(1, length, 16))
    assert wide_sin[..., 48:64].abs().max() < 1e-24


def test_a_longrope_that_multiplies_is_left_to_targets_that_rotate_a_part() -> None:
    family = load("family", "phi3")()
    dense = family.config({**COMMON, **PICO["phi4-mini"][1], "model_type": "phi3"})
    assert not can_be_masked(dense.rope_parameters, 512)
    assert [t for t in family.targets if not load("target", t)().lacks(dense)] == ["glm4_moe"]
    whole_context = {**PICO["phi4-mini"][1], "original_max_position_embeddings": 512}
    dense = family.config({**COMMON, **whole_context, "model_type": "phi3"})
    assert can_be_masked(dense.rope_parameters, 512)


def test_a_target_that_rotates_a_part_comes_first_and_another_says_what_it_does(pico: Any) -> None:
    assert upcycle.plan(str(pico("phi3-partial")), experts=2).target == "glm4_moe"
    plan = upcycle.plan(str(pico("phi3-partial")), experts=2, target="mixtral")
    assert any("turn 4 dimensions of each head as before and stop the other 4" in warning for warning in plan.warnings)


def test_gated_experts_for_squared_relu_are_announced(pico: Any) -> None:
    plan = upcycle.plan(str(pico("arcee")), experts=2)
    assert any("gate and up are both the dense up projection" in warning for warning in plan.warnings)
