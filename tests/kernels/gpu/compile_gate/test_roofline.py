"""FLOPs, bytes and saved bytes against the formulas they come from, and against tensors that are counted."""

from __future__ import annotations

import pytest

from upcycle.kernels.gpu.compile_gate.roofline import GPUS, SHAPES, Cost, Shape, kernels, saved_bytes, total

SHAPE = Shape("odd", tokens=101, hidden=48, width=20, experts=7, top_k=3)
R, H, I, E, T = 303, 48, 20, 7, 101  # noqa: E741


def test_flops_are_six_and_eighteen_per_weight() -> None:
    # Sums per token are small beside the products.
    assert total(SHAPE, False).flops == 6 * R * H * I + 2 * R * H
    assert total(SHAPE, True).flops == 18 * R * H * I + 3 * R * H


def test_bytes() -> None:
    forward = 3 * R * H + T * H + 4 * R * I + 3 * E * H * I
    backward = 5 * R * H + T * H + 12 * R * I + 6 * E * H * I
    assert total(SHAPE, False).bytes == 2 * forward
    assert total(SHAPE, True).bytes == 2 * (forward + backward)


def test_only_chosen_experts_are_read() -> None:
    few = Shape("decode", 1, 48, 20, 1000, 2)
    assert kernels(few)["down projection"].bytes == 2 * (2 * 20 + 2 * 48 + 2 * 48 * 20)


def test_saved() -> None:
    assert saved_bytes(SHAPE) == 2 * (T * H + 2 * R * I)
    assert saved_bytes(SHAPE, keep_z=False) == 2 * T * H
    # Qwen3-30B: 8192 tokens keep 224 MiB.
    assert saved_bytes(SHAPES[0]) == 224 * 2**20


def test_floor() -> None:
    gpu = GPUS[1]
    assert Cost(gpu.flops, 1).floor(gpu) == pytest.approx(1)
    assert Cost(1, 2 * gpu.bandwidth).floor(gpu) == pytest.approx(2)
