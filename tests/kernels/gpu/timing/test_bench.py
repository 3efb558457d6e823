"""What the benchmark compares computes the same thing; without a GPU it says so."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from upcycle.errors import EnvironmentFault
from upcycle.kernels.gpu.compile_gate.roofline import Shape
from upcycle.kernels.gpu.timing import bench
from upcycle.kernels.layout.expert_weights import Gradients
from upcycle.kernels.layout.reference import backward, forward

SHAPE = Shape("small", tokens=24, hidden=32, width=16, experts=4, top_k=2)


@pytest.mark.parametrize("skew", [0.0, 2.0])
@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_the_baseline_is_the_same_layer(skew: float) -> None:
    x, weights, dispatch, scores = bench.layer(SHAPE, torch.device("cpu"), skew)
    wide = (x.double(), *(tensor.double() for tensor in (weights.up, weights.down)), scores.double())
    from dataclasses import replace

    exact = replace(weights, up=wide[1], down=wide[2])
    output, z = forward(wide[0], exact, dispatch, wide[3], True)
    found = bench.grouped_products(x, weights, dispatch, scores, False)()
    u = torch.finfo(torch.bfloat16).eps / 2
    # z, h, values, their products with scores and sums are rounded.
    assert (found.double() - output).norm() < 2 * 6**0.5 * u * output.norm()
    needs = Gradients(x=wide[0], up=wide[1], down=wide[2], scores=wide[3])
    wanted = backward(found.double(), wide[0], exact, dispatch, wide[3], z, needs)
    pairs = zip(
        bench.grouped_products(x, weights, dispatch, scores, True)(),
        (wanted.x, wanted.up, wanted.down, wanted.scores),
        strict=True,
    )
    for mine, reference in pairs:
        assert reference is not None
        difference = mine.double().flatten() - reference.flatten()
        assert difference.norm() < 2 * 8**0.5 * u * reference.norm()


def test_skew() -> None:
    _, _, even, _ = bench.layer(Shape("wide", 4096, 8, 8, 8, 2), torch.device("cpu"))
    _, _, skewed, _ = bench.layer(Shape("wide", 4096, 8, 8, 8, 2), torch.device("cpu"), 1.5)
    assert even.offsets.diff().max() < 1.2 * even.offsets.diff().min()
    assert skewed.offsets.diff()[0] > 5 * skewed.offsets.diff()[-1]


def test_the_dense_layer_has_the_flops() -> None:
    output = bench.dense(SHAPE, torch.device("cpu"), False)()
    assert output.shape == (24, 32)
    gradients = bench.dense(SHAPE, torch.device("cpu"), True)()
    assert [tuple(part.shape) for part in gradients] == [(24, 32), (64, 32), (32, 32)]


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault):
        bench.main([])
