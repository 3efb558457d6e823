"""Activations against the written-out ones, their derivatives against finite differences and autograd."""

from __future__ import annotations

import pytest
import torch

from upcycle.kernels.cpu.activations import activate, activation_gradient
from upcycle.kernels.layout import reference
from upcycle.kernels.layout.expert_weights import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives(name: str) -> None:
    z = torch.linspace(-9, 9, 401, dtype=torch.float64).requires_grad_()  # 0 is among them
    expected = reference.activation(name, z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    plain = z.detach()
    out = torch.empty_like(plain)
    assert activate(name, plain, out) is out
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-14)
    grad = torch.rand_like(plain)
    found = activation_gradient(name, grad, plain, torch.empty_like(plain))
    torch.testing.assert_close(found, grad * slope, rtol=1e-12, atol=1e-13)
    step = 1e-6
    away = plain.abs() > 1e-3  # not across a corner
    differences = (reference.activation(name, plain + step) - reference.activation(name, plain - step)) / (2 * step)
    torch.testing.assert_close(found[away], (grad * differences)[away], rtol=1e-6, atol=1e-8)


def _apart(found: torch.Tensor, expected: torch.Tensor, z: torch.Tensor) -> float:
    """The largest difference, in units of what two ways of computing one value may differ by.

    Vectorised and scalar code round exp, erf and tanh differently, each within a unit of its last place; those lie within 1, are
    multiplied by at most 1 + |z| (in derivatives z times the density's slope), and some four operations round after them.
    """
    unit = torch.finfo(z.dtype).eps * (1 + z.abs()) * 4
    return float(((found - expected).abs() / unit).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place_and_strided(name: str) -> None:
    """In one layout the same bits every time; in another, which torch may compute by other instructions, the same value."""
    z, grad = 3 * torch.randn(5, 16, dtype=torch.float64), torch.rand(5, 8, dtype=torch.float64)
    gate, plain = z[:, :8], z[:, :8].contiguous()
    expected = activate(name, plain, torch.empty_like(plain))
    slope = activation_gradient(name, grad.clone(), plain, torch.empty_like(plain))
    assert torch.equal(activate(name, plain, torch.empty_like(plain)), expected)
    target = torch.zeros(5, 16, dtype=torch.float64)
    activate(name, gate, target[:, 8:])
    assert _apart(target[:, 8:], expected, gate) <= 1
    assert not target[:, :8].any()
    own = grad.clone()
    activation_gradient(name, own, gate, own)
    assert _apart(own, slope, gate) <= 1
    copy = z.clone()
    activate(name, copy[:, :8], copy[:, :8])
    assert _apart(copy[:, :8], expected, gate) <= 1
    again = z.clone()
    activate(name, again[:, :8], again[:, :8])
    assert torch.equal(again, copy)
