"""Activations against the written-out ones, their derivatives against finite differences and autograd."""

from __future__ import annotations

import pytest
import torch

from upcycle.kernels import reference
from upcycle.kernels.activation import activate, activation_gradient
from upcycle.kernels.experts import ACTIVATIONS


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


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place_and_strided(name: str) -> None:
    z, grad = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    expected = activate(name, z[:, :8].contiguous(), torch.empty(5, 8, dtype=torch.float64))
    slope = activation_gradient(name, grad.clone(), z[:, :8].contiguous(), torch.empty(5, 8, dtype=torch.float64))
    target = torch.zeros(5, 16, dtype=torch.float64)
    activate(name, z[:, :8], target[:, 8:])
    assert torch.equal(target[:, 8:], expected)
    assert not target[:, :8].any()
    own = grad.clone()
    activation_gradient(name, own, z[:, :8], own)
    assert torch.equal(own, slope)
    copy = z.clone()
    activate(name, copy[:, :8], copy[:, :8])
    assert torch.equal(copy[:, :8], expected)
