"""Experts of the form act(gate) * (up + 1): no precision is lost to the 1, and nothing is rounded on the way."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear, silu

from upcycle.ffn import expert_tensors
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import Part
from upcycle.ffn.shifted_up import in_turn, up_scale

F, D = 96, 64


def ffn_of(up_size: float, dtype: torch.dtype = torch.bfloat16) -> FeedForward:
    """A random FFN with biases; the outputs of its up projection are about ``up_size``."""
    rng = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    norm = torch.rand(D, generator=rng) + 0.5
    gate, up, down = draw(F, D) / 8, draw(F, D) * up_size / 8, draw(D, F) / 8
    tensors = {
        "gate": gate,
        "up": up,
        "down": down,
        "gate_bias": draw(F) / 4,
        "up_bias": draw(F) * up_size / 4,
        "down_bias": draw(D),
    }
    return FeedForward(layer=0, norm=norm, activation="silu", **{k: v.to(dtype) for k, v in tensors.items()})


def written(ffn: FeedForward) -> list[torch.Tensor]:
    """Gate and up, their bias, down and its bias of one expert that is all of the FFN."""
    everything = ExpertSpec(torch.arange(F))
    tensors = ExpertTensors(ffn, LayerBlueprint(0, (everything,), 1, 1.0))
    kinds = ("shifted_gate_up", "shifted_gate_up_bias", "shifted_down", "down_bias")
    return [tensors.part(Part(kind)) for kind in kinds]


def output(parts: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """As GPT-OSS's experts compute it."""
    gate_up = x @ parts[0] + parts[1]
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    return ((up + 1) * (gate * torch.sigmoid(gate))) @ parts[2] + parts[3]


def dense(ffn: FeedForward, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    gate, up, down, gate_bias, up_bias, bias = (
        ffn.tensor(name).to(dtype)  # type: ignore[union-attr]
        for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    )
    x = x.to(dtype)
    return linear(silu(linear(x, gate, gate_bias)) * linear(x, up, up_bias), down, bias)


@pytest.mark.parametrize("up_size", [1e-4, 0.01, 0.3, 1.0, 30.0])
def test_in_bfloat16_it_is_as_near_as_the_dense_ffn(up_size: float) -> None:
    ffn = replace(ffn_of(up_size), down_bias=torch.zeros(D, dtype=torch.bfloat16))
    x = (torch.randn(256, D, generator=torch.Generator().manual_seed(2)) * ffn.norm).bfloat16()
    exact = dense(ffn, x, torch.float64)
    own = torch.linalg.norm(dense(ffn, x, torch.bfloat16).double() - exact)
    # A quarter more squared error in up, which is one of about four roundings; the sum up + 1 is another one.
    assert torch.linalg.norm(output(written(ffn), x).double() - exact) < 1.5 * own


def test_without_the_scale_small_values_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_tensors, "up_scale", lambda _: 1.0)
    with pytest.raises(AssertionError):
        test_in_bfloat16_it_is_as_near_as_the_dense_ffn(0.01)


@pytest.mark.parametrize("up_size", [0.01, 1.0])
def test_in_fp64_it_is_the_dense_ffn(up_size: float) -> None:
    ffn = ffn_of(up_size, torch.float64)
    x = torch.randn(50, D, dtype=torch.float64)
    torch.testing.assert_close(output(written(ffn), x), dense(ffn, x, torch.float64), rtol=1e-11, atol=1e-12)


def test_the_scale_is_the_least_power_of_two_that_makes_up_large_enough() -> None:
    up, rest = torch.full((3, 4), 0.25), {"down": torch.ones(4, 3), "activation": "silu", "layer": 0}
    ffn = FeedForward(gate=up, up=up, norm=torch.full((4,), 2.0), **rest)  # type: ignore[arg-type]
    assert up_scale(ffn) == 2.0  # rows are of length 0.5 * 2, and 2 is wanted
    assert up_scale(replace(ffn, up=up / 1.01)) == 4.0
    assert up_scale(replace(ffn, up=up * 100)) == 1.0
    assert up_scale(replace(ffn, up=up * 0)) == 1.0
    assert up_scale(replace(ffn, up_bias=torch.full((3,), math.sqrt(3.1)))) == 1.0


def test_gate_and_up_are_in_turn() -> None:
    gate, up = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    assert in_turn(gate, up).tolist() == [[1, 5, 3, 7], [2, 6, 4, 8]]
    assert in_turn(gate[:, 0], up[:, 0]).tolist() == [1, 5, 3, 7]
