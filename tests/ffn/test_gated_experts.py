"""FFNs of every form as gated experts without biases: the same outputs, computed from the written parts in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from ffn_forms import ACTIVATIONS, FORMS, ffn_of

from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm
from upcycle.ffn.gated_experts import ConstantInput, GatedExperts
from upcycle.ffn.moe_shape import Part

D, F = 6, 10
ROUTED = ([0, 1, 2, 9], [7, 3, ZERO_NEURON, 4])
SQUARED = {
    "squared ReLU": FfnForm("relu2", False),
    "squared ReLU, biases": FfnForm("relu2", False, frozenset({"up", "down"})),
}
ALL = FORMS | SQUARED


def layer(form: FfnForm, dtype: torch.dtype = torch.float64) -> tuple[FeedForward, LayerBlueprint]:
    """Behind a norm of random weight and bias, in two experts."""
    rng = torch.Generator().manual_seed(1)
    norm, bias = torch.randn(2, D, generator=rng, dtype=torch.float64)
    ffn = replace(ffn_of(form, F, D, dtype=dtype), norm=norm.to(dtype), norm_bias=bias.to(dtype))
    routed = tuple(ExpertSpec(torch.tensor(neurons)) for neurons in ROUTED)
    return ffn, LayerBlueprint(3, routed, 2, 3.0, router=torch.randn(2, D, generator=rng))


def normed(tokens: int = 20) -> torch.Tensor:
    """Of a LayerNorm without weight and bias, fp64 ``[t, d]``."""
    z = torch.randn(tokens, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, correction=0)


def own_input(form: FfnForm, ffn: FeedForward, z: torch.Tensor) -> torch.Tensor:
    """What the experts read: their own norm's output, or the dense one's where nothing is folded."""
    if form.needs_constant:
        return z + ConstantInput(D).level
    assert ffn.norm_bias is not None
    return z * ffn.norm + ffn.norm_bias


def function(name: str) -> Callable[[np.ndarray], np.ndarray]:
    return ACTIVATIONS[name]


@pytest.mark.parametrize("name", ALL)
def test_experts_put_out_what_their_neurons_and_the_bias_do(name: str) -> None:
    form = ALL[name]
    ffn, blueprint = layer(form)
    assert ffn.norm_bias is not None
    z = normed()
    x = (z * ffn.norm + ffn.norm_bias).numpy()
    size, made = form.width_as_gated(4), GatedExperts(ExpertTensors(ffn, blueprint))
    assert size == (8 if "down" in form.biases else 4)
    own = own_input(form, ffn, z).numpy()
    act, gated_act = function(form.activation), function(form.as_gated.activation)
    parts = {
        k: None if (t := ffn.tensor(k)) is None else t.numpy() for k in ("gate", "up", "down", "gate_bias", "up_bias")
    }
    for expert, listed in enumerate(ROUTED):
        neurons = [j for j in listed if j != ZERO_NEURON]

        def out(matrix: str, kept: list[int] = neurons) -> np.ndarray:
            weight, bias = parts[matrix], parts[f"{matrix}_bias"]
            assert weight is not None
            return x @ weight[kept].T + (0 if bias is None else bias[kept])

        hidden = act(out("gate")) * out("up") if form.gated else act(out("up"))
        assert parts["down"] is not None
        expected = 3 * hidden @ parts["down"][:, neurons].T
        expected = expected + (0 if ffn.down_bias is None else ffn.down_bias.numpy())
        gate, up, down = (made.part(Part(kind, expert, size=size)).numpy() for kind in ("gate", "up", "down"))  # type: ignore[arg-type]
        assert gate.shape == up.shape == down.T.shape == (size, D)
        found = gated_act(own @ gate.T) * (own @ up.T) @ down.T
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_the_router_reads_what_the_dense_one_would(name: str) -> None:
    form = ALL[name]
    ffn, blueprint = layer(form)
    assert ffn.norm_bias is not None
    assert blueprint.router is not None
    z = normed()
    expected = (z * ffn.norm + ffn.norm_bias) @ blueprint.router.double().T
    made = GatedExperts(ExpertTensors(ffn, blueprint)).part(Part("router")).double()
    torch.testing.assert_close(own_input(form, ffn, z) @ made.T, expected, rtol=1e-12, atol=1e-12)


def test_a_factor_multiplies_the_down_bias_too() -> None:
    form = ALL["ungated, biases"]
    made = GatedExperts(ExpertTensors(*layer(form)))
    whole, half = (made.part(Part("down", 0, factor=factor, size=8)) for factor in (1.0, 0.5))
    assert whole[:, 4].any()
    assert torch.equal(half, whole / 2)


def test_parts_are_rounded_once_to_the_dtype_of_the_experts() -> None:
    form = ALL["ungated, biases"]
    half, whole = (GatedExperts(ExpertTensors(*layer(form, dtype))) for dtype in (torch.bfloat16, torch.float64))
    assert half.part(Part("gate", 0, size=8)).dtype == torch.bfloat16
    constant = whole.part(Part("up", 0, size=8))[0]
    assert torch.equal(half.part(Part("up", 0, size=8))[0], constant.to(torch.bfloat16))


@pytest.mark.parametrize("width", [32, 48, 192, 2048, 2560, 3072, 3328, 4096, 4608, 6144, 8192])
def test_the_constant_is_one_in_bfloat16(width: int) -> None:
    level, along = (torch.tensor(value) for value in (ConstantInput(width).level, ConstantInput(width).along))
    assert level.to(torch.bfloat16).double() == ConstantInput(width).level
    assert 0.5 <= ConstantInput(width).level * width**0.25 <= 3
    # Without a choice of the level, 1 / (d t) rounds by up to 2^-9; of 128 levels, some round sixteen times less.
    assert abs(width * level.double() * along.to(torch.bfloat16).double() - 1) < 2.0**-13
