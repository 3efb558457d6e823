"""What every registered router initialiser promises."""

from __future__ import annotations

import pytest
import torch

from upcycle.blueprint import ExpertSpec, LayerBlueprint
from upcycle.conversion import generator
from upcycle.errors import UsageError
from upcycle.feed_forward import FeedForward
from upcycle.registry import ROUTERS, load
from upcycle.routers.cool import CoolParameters, CoolRouter
from upcycle.routers.random_rows import RandomParameters, RandomRouter
from upcycle.routers.zero import ZeroRouter

D, E = 64, 8


def given() -> tuple[LayerBlueprint, FeedForward]:
    rng = torch.Generator().manual_seed(1)
    ffn = FeedForward(
        0,
        *(torch.randn(shape, generator=rng) for shape in ((16, D), (16, D), (D, 16))),
        norm=torch.rand(D, generator=rng) * 3,
        activation="silu",
    )
    return LayerBlueprint(0, (ExpertSpec(torch.arange(2)),) * E, top_k=2, scale=1.0), ffn


@pytest.mark.parametrize("name", ROUTERS)
def test_rows_are_finite_fp32_of_the_right_shape_and_deterministic(name: str) -> None:
    cls = load("router", name)
    first, second = (cls(cls.Parameters()).rows(*given(), generator(0, 0, "router")) for _ in range(2))
    assert first.shape == (E, D)
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_weights_means_equal_to_the_last_bit(name: str) -> None:
    cls = load("router", name)
    blueprint, ffn = given()
    rows = cls(cls.Parameters()).rows(blueprint, ffn, generator(0, 0, "router"))
    weights = torch.softmax(torch.randn(100, D) @ rows.T, dim=-1)
    assert (weights == weights[:, :1]).all().item() is cls.equal_weights


@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_cool_weights_differ_by_at_most_the_tolerance_on_the_worst_input(tolerance: float) -> None:
    blueprint, ffn = given()
    rows = CoolRouter(CoolParameters(tolerance=tolerance)).rows(blueprint, ffn, generator(0, 0, "router"))
    rows = rows.bfloat16().double()  # as it is stored
    # Worst case for every pair: an input that lies along the difference of their rows, as long as an RMSNorm lets it be.
    worst = 0.0
    for i in range(E):
        for j in range(E):
            seen = (rows[i] - rows[j]) * ffn.norm.double()
            x = seen / seen.norm().clamp(min=1e-30) * D**0.5 * ffn.norm.double()
            weights = torch.softmax(x @ rows.T, -1)
            worst = max(worst, (weights.max() / weights.min() - 1).item())
    assert 0.5 * tolerance < worst <= tolerance


def test_random_rows_have_the_wanted_std() -> None:
    blueprint, ffn = given()
    rows = RandomRouter(RandomParameters(std=0.5)).rows(blueprint, ffn, generator(0, 0, "router"))
    # 512 samples: the sample std is within four standard errors (1/sqrt(2n)) of the true one.
    assert rows.std().item() == pytest.approx(0.5, rel=4 / (2 * rows.numel()) ** 0.5)


def test_zero_router_is_refused_for_training() -> None:
    with pytest.raises(UsageError, match="cannot be trained"):
        ZeroRouter(ZeroRouter.Parameters()).check(experts=8, top_k=4)
    ZeroRouter(ZeroRouter.Parameters()).check(experts=8, top_k=8)
    ZeroRouter(ZeroRouter.Parameters(inference_only=True)).check(experts=8, top_k=4)
