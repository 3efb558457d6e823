"""Which placements of a scale come out of an FFN as the scale itself, against the FFN's own formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ffn_forms import ACTIVATIONS, arrays, ffn_of, output

from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm

POWERS = {
    "down": (0.0, 0.0, 1.0),
    "up_down": (0.0, 0.5, 0.5),
    "thirds": (1 / 3, 1 / 3, 1 / 3),
    "twice": (0.0, 1.0, 1.0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("powers", POWERS.values(), ids=list(POWERS))
def test_scales_output_says_what_the_formula_does(
    powers: tuple[float, float, float], gated: bool, activation: str
) -> None:
    form = FfnForm(activation, gated, frozenset({"gate", "up"} if gated else {"up"}))
    own, x, scale = dict(arrays(ffn_of(form, 12, 5))), np.random.default_rng(0).standard_normal((7, 5)), 8.0
    plain = output(own, activation, x)
    for name, power in zip(("gate", "up", "down"), powers, strict=True):
        for key in {name, f"{name}_bias"} & set(own):
            own[key] = own[key] * scale**power
    assert form.scales_output(powers) == np.allclose(output(own, activation, x), scale * plain, rtol=1e-12, atol=1e-12)


def test_the_form_follows_from_the_tensors() -> None:
    form = FfnForm("gelu", False, frozenset({"up", "down"}))
    ffn = ffn_of(form, 12, 5)
    assert (ffn.form, form.matrices, form.activated) == (form, ("up", "down"), "up")
    assert ffn.activated_rows is ffn.up
    assert (ffn.intermediate_size, ffn.hidden_size, ffn.dtype) == (12, 5, torch.float64)
    gated = ffn_of(FfnForm(), 12, 5)
    assert (gated.form, gated.form.activated) == (FfnForm(), "gate")
    assert gated.activated_rows is gated.gate


@pytest.mark.parametrize("name", ["gate_bias", "up_bias", "down_bias"])
def test_a_bias_needs_its_projection(name: str) -> None:
    up, down = torch.zeros(6, 4), torch.zeros(4, 6)
    with pytest.raises(ValueError, match=name):
        FeedForward(0, None, up, down, torch.ones(4), "relu", **{name: torch.zeros(5)})
