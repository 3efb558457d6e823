"""Elements beyond 2^31: the helper that makes every address, and rows that really lie so far apart."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import Case, make

from upcycle.kernels.gpu.backend import backward, forward
from upcycle.kernels.gpu.tile_table import TileTable
from upcycle.kernels.gpu.triton_code.addressing import offset


@triton.jit
def address_kernel(index, out, stride: tl.int64, count: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, count)
    tl.store(out + place, offset(tl.load(index + place), stride))


@triton.jit
def careless_kernel(index, out, stride: tl.int32, count: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, count)
    tl.store(out + place, tl.load(index + place) * stride)


INDICES = (0, 1, 2047, 2048, 65535, 2**31 - 1)
STRIDES = (1, 4096, 2**20 + 1, 2**30)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_helper(stride: int, dtype: torch.dtype, device: torch.device) -> None:
    padded = (*INDICES, 3, 5)
    index = torch.tensor(padded, dtype=dtype, device=device)
    out = torch.empty(len(padded), dtype=torch.int64, device=device)
    address_kernel[(1,)](index, out, stride, len(padded))
    assert out.tolist() == [number * stride for number in padded]


def test_32_bits_would_wrap(device: torch.device) -> None:
    index = torch.tensor([2048, 4096], dtype=torch.int32, device=device)
    out = torch.empty(2, dtype=torch.int64, device=device)
    careless_kernel[(1,)](index, out, 2**20, 2)
    assert out.tolist() != [2**31, 2**32]


@pytest.mark.slow
def test_rows_four_gigabytes_apart(device: torch.device, table: TileTable) -> None:
    """Only the pages that are touched take memory."""
    case = Case(tokens=3, dtype=torch.bfloat16)
    made = make(case, device)
    x, weights, dispatch, scores = made.arguments
    stride = 2**31 - 2**10
    try:
        far = torch.empty(2 * stride + case.hidden, dtype=x.dtype, device=device)
    except RuntimeError:
        pytest.skip("8 GiB of address space are not to be had")
    far = far.as_strided((3, case.hidden), (stride, 1))
    far.copy_(x)
    results = []
    for rows in (x, far):
        output, z = forward(rows, weights, dispatch, scores, True, table)
        found = backward(made.problem.grad, rows, weights, dispatch, scores, z, made.gradients(), table=table)
        results.append([output, found.x, found.up, found.down, found.scores])
    for compact, apart in zip(*results, strict=True):
        assert torch.equal(compact, apart)
