"""The interpreter's two defects with bf16 are worked round, and are still there: else the workaround can go."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from upcycle.kernels.gpu.triton_code.addressing import dot, rounded
from upcycle.kernels.layout.devices import interpreted


@triton.jit
def round_kernel(values, out, count: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, count)
    tl.store(out + place, rounded(tl.load(values + place), out))


@triton.jit
def truncate_kernel(values, out, count: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, count)
    tl.store(out + place, tl.load(values + place).to(tl.bfloat16))


@triton.jit
def dot_kernel(a, b, out, careful: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, 16)
    at = place[:, None] * 16 + place[None, :]
    left, right = tl.load(a + at), tl.load(b + at)
    if careful:  # noqa: SIM108 - compiled code
        total = dot(left, right, tl.zeros((16, 16), tl.float32), "tf32x3")
    else:
        total = tl.dot(left, right)
    tl.store(out + at, total)


def test_rounding(device: torch.device) -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=rng) * torch.randint(-120, 120, (4096,), generator=rng).float().exp2()
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.00390625, 1.01171875, 3.4e38])
    values[: len(special)] = special
    values = values.to(device)
    out = torch.empty(4096, dtype=torch.bfloat16, device=device)
    round_kernel[(1,)](values, out, 4096)
    assert torch.equal(out.nan_to_num(-7), values.bfloat16().nan_to_num(-7))
    assert out.isnan().tolist() == values.isnan().tolist()


def test_dot(device: torch.device) -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=rng).bfloat16().to(device) for _ in range(2))
    out = torch.empty(16, 16, device=device)
    dot_kernel[(1,)](a, b, out, True)
    assert torch.allclose(out.double(), a.double() @ b.double(), rtol=0, atol=16 * 16 * 2.0**-24)


@pytest.mark.skipif(not interpreted(), reason="compiled kernels have no such defects")
def test_the_defects_are_still_there(device: torch.device) -> None:
    values = torch.tensor([1.00390625 + 2**-10] * 16)
    out = torch.empty(16, dtype=torch.bfloat16)
    truncate_kernel[(1,)](values, out, 16)
    assert not torch.equal(out, values.bfloat16())
    a = torch.eye(16).bfloat16()
    product = torch.empty(16, 16)
    dot_kernel[(1,)](a, a, product, False)
    assert not torch.equal(product, torch.eye(16))
