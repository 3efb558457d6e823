"""The specification against stock modules of transformers and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from expert_cases import apart, make_weights, random_ids, tensors_of
from torch.nn import functional

from upcycle.kernels.layout import reference
from upcycle.kernels.layout.dispatch import route
from upcycle.kernels.layout.expert_weights import ACTIVATIONS, ExpertWeights, Gradients


def test_by_hand() -> None:
    """Two experts of one neuron: relu(x0) * x1, and relu(x0 + x1) * 2 x0, each written to one of two outputs."""
    up = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.0]]])
    down = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    weights = ExpertWeights(up, down, "relu")
    x = torch.tensor([[3.0, 5.0], [-1.0, 4.0]])
    found = reference.experts_output(
        x, weights, torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.5, 2.0], [10.0, 3.0]])
    )
    assert found.tolist() == [[0.5 * 15, 2 * 48], [0.0, 10 * 3 * -2]]
    once = reference.experts_output(x, weights, torch.tensor([[0, 1], [1, 0]]), capacity=1)
    assert once.tolist() == [[15.0, 48.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs(name: str) -> None:
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torchs = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x) ** 2,
    }
    torch.testing.assert_close(reference.activation(name, z), torchs[name](z), rtol=1e-12, atol=1e-14)


def test_stock_mixtral() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=12, intermediate_size=8, num_local_experts=5)
    config._experts_implementation = "eager"
    module, weights = MixtralExperts(config).double(), make_weights("stacked", grad=True)
    module.gate_up_proj.data, module.down_proj.data = weights.up.data, weights.down.data
    ids, scores = random_ids(9, 3, 5), torch.rand(9, 3, dtype=torch.float64)
    x = torch.randn(9, 12, dtype=torch.float64)
    expected, found = module(x, ids, scores), reference.experts_output(x, weights, ids, scores)
    assert apart(found, expected) < 1e-14
    grad = torch.randn_like(found)
    for mine, stock in zip(
        torch.autograd.grad(found, [weights.up, weights.down], grad),
        torch.autograd.grad(expected, [module.gate_up_proj, module.down_proj], grad),
        strict=True,
    ):
        assert apart(mine, stock) < 1e-14


@pytest.mark.parametrize("dynamic", [True, False])
def test_as_a_backend(dynamic: bool) -> None:
    """Forward and backward with index vectors are the specification and its autograd."""
    weights = make_weights("ragged", bias=True, grad=True)
    ids, offsets = random_ids(6, 2, 6), None
    if dynamic:
        ids, offsets = ids.flatten(), torch.tensor([0, 0, 5, 6, 12])
    x = torch.randn(4 if dynamic else 6, 12, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(12, dtype=torch.float64, requires_grad=True)
    expected = reference.experts_output(x, weights, ids, scores.view_as(ids), offsets)
    inputs, grad = [x, *tensors_of(weights), scores], torch.randn_like(expected)
    slopes = torch.autograd.grad(expected, inputs, grad)
    dispatch = route(ids, 5, offsets)
    with torch.no_grad():
        found, z = reference.forward(x, weights, dispatch, scores, True)
        needs = Gradients(x, weights.up, weights.down, weights.up_bias, weights.down_bias, scores)
        made = reference.backward(grad, x, weights, dispatch, scores, z, needs)
        some = reference.backward(grad, x, weights, dispatch, scores, z, Gradients(down=weights.down))
    assert torch.equal(found, expected)
    for mine, slope in zip(made, slopes, strict=True):
        assert torch.equal(mine, slope)
    assert torch.equal(some.down, slopes[2])
    assert [value is None for value in some] == [True, True, False, True, True, True]


def test_no_tokens_and_no_experts() -> None:
    weights = make_weights("stacked")
    empty = torch.zeros(0, 12, dtype=torch.float64)
    assert reference.experts_output(empty, weights, torch.zeros(0, 2, dtype=torch.long)).shape == (0, 12)
    x = torch.randn(3, 12, dtype=torch.float64)
    dispatch = route(torch.full((3, 2), 5), 5)
    assert not reference.experts_output(x, weights, torch.full((3, 2), 5)).any()
    with torch.no_grad():
        made = reference.backward(x, x, weights, dispatch, None, x, Gradients(x=x, up=weights.up))
    assert not made.x.any()
    assert not made.up.any()
