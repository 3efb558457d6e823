"""Activations in one pass, compiled and not: against torch in fp64, in every shape, on any number of threads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from expert_cases import apart
from torch.nn import functional

from upcycle.kernels.cpu.fused_activations import FUSED_CODES, hidden, hidden_and_gradient, kernel
from upcycle.kernels.entry.process_state import forget
from upcycle.kernels.layout.expert_weights import ACTIVATIONS

EPS = torch.finfo(torch.float32).eps
FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda z: functional.relu(z).square(),
}


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setenv("UPCYCLE_COMPILE", "0")
    elif shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    forget()
    assert (kernel() is not None) == (request.param == "compiled")
    yield request.param
    forget()


@pytest.mark.parametrize("rows_width", [(1, 1), (3, 7), (5, 8), (2, 16), (4, 33), (17, 129), (300, 257)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation: str, gated: bool, rows_width: tuple[int, int], way: str) -> None:
    rows, width = rows_width
    draw = torch.Generator().manual_seed(rows + width)
    z = 4 * torch.randn(rows, 2 * width if gated else width, generator=draw)
    dh, scale = torch.randn(rows, width, generator=draw), torch.rand(rows, generator=draw)
    exact = z.double().requires_grad_()
    value = FUNCTIONS[activation](exact[:, :width]) * (exact[:, width:] if gated else 1)
    h = torch.full((rows, width), torch.nan)
    assert apart(hidden(activation, gated, z, h), value.detach()) < 8 * EPS
    (slope,) = torch.autograd.grad((value * dh.double() * scale.double()[:, None]).sum(), exact)
    for factor in (scale, None):
        h, dz, products = torch.full_like(h, torch.nan), torch.full_like(z, torch.nan), torch.full((rows,), torch.nan)
        hidden_and_gradient(activation, gated, z, dh.clone(), factor, h, dz, products)
        by = 1 if factor is None else scale.double()[:, None]
        assert apart(h, value.detach() * by) < 8 * EPS
        expected = slope if factor is not None else slope / scale.double()[:, None]
        assert apart(dz, expected) < 16 * EPS
        terms = dh.double() * value.detach()
        rounding = EPS * (width + 16) * terms.abs().sum(1)
        assert ((products.double() - terms.sum(1)).abs() <= rounding).all(), way


@pytest.mark.parametrize("activation", FUSED_CODES)
def test_extremes(activation: str, way: str) -> None:
    z = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4, -1e10, torch.inf, torch.nan, 3e-3]])
    h, dz = torch.empty_like(z), torch.empty_like(z)
    hidden_and_gradient(activation, False, z, torch.ones_like(z), None, h, dz, None)
    exact = z.double().requires_grad_()
    expected = FUNCTIONS[activation](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    sound = [0, 1, 2, 3, 4, 5, 6, 7, 10]
    tiny = 1e-30  # what a sigmoid of -80 leaves of it
    torch.testing.assert_close(h[0, sound].double(), expected.detach()[0, sound], rtol=16 * EPS, atol=tiny)
    torch.testing.assert_close(dz[0, sound].double(), slope[0, sound], rtol=64 * EPS, atol=tiny)
    assert h[0, 8] == torch.inf
    assert h[0, 9].isnan(), way


@pytest.mark.parametrize("way", ["compiled"], indirect=True)
@pytest.mark.usefixtures("way")
def test_the_same_bits_wherever_and_on_any_number_of_threads() -> None:
    z, dh, scale = 3 * torch.randn(512, 2 * 203), torch.randn(512, 203), torch.rand(512)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made = torch.empty_like(dh), torch.empty_like(z), torch.empty(512)
            hidden_and_gradient("silu", True, z, dh.clone(), scale, *made)
            found.append(made)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    one = torch.empty(1, 203), torch.empty(1, 2 * 203), torch.empty(1)
    hidden_and_gradient("silu", True, z[7:8], dh[7:8].clone(), scale[7:8], *one)
    assert torch.equal(one[0][0], found[0][0][7])
    assert torch.equal(one[1][0], found[0][1][7])
    assert torch.equal(one[2], found[0][2][7:8])
