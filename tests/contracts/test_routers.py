"""What every registered router initialiser promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ffn_forms import FORMS, ffn_of

from upcycle.calibration.decide_layer import generator
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm
from upcycle.ffn.router_capture import captured
from upcycle.ffn.router_network import RouterNetwork
from upcycle.ffn.source_samples import Samples
from upcycle.registry import ROUTERS, load
from upcycle.routers.base import Router
from upcycle.routers.cool import CoolParameters, CoolRouter
from upcycle.routers.random_rows import RandomParameters, RandomRouter
from upcycle.routers.zero import ZeroRouter

D, E = 64, 8
OF_SOURCES = [name for name in ROUTERS if load("router", name).samples]


def given() -> tuple[LayerBlueprint, FeedForward]:
    rng = torch.Generator().manual_seed(1)
    ffn = FeedForward(
        0,
        *(torch.randn(shape, generator=rng) for shape in ((16, D), (16, D), (D, 16))),
        norm=torch.rand(D, generator=rng) * 3,
        activation="silu",
    )
    return LayerBlueprint(0, (ExpertSpec(torch.arange(2)),) * E, top_k=2, scale=1.0), ffn


def telling() -> tuple[LayerBlueprint, FeedForward]:
    """A layer whose experts each answer to one direction of their inputs."""
    rng = torch.Generator().manual_seed(2)
    gate, up = torch.randn(2, 4 * E, D, generator=rng) * 0.1
    gate += 2 * torch.eye(D)[:E].repeat_interleave(4, dim=0)
    up += torch.eye(D)[E]
    ffn = FeedForward(0, gate, up, torch.randn(D, 4 * E, generator=rng), torch.ones(D), "silu")
    return LayerBlueprint(0, tuple(map(ExpertSpec, torch.arange(4 * E).split(4))), top_k=2, scale=1.0), ffn


def tokens(ffn: FeedForward, seed: int) -> Activations:
    """Tokens along two of the directions each, and a constant one; one batch in eight is held out."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, D, generator=rng) * 0.2
    x.scatter_add_(1, torch.rand(1024, E, generator=rng).topk(2, dim=1).indices, torch.full((1024, 2), 3.0))
    x[:, E] += 2
    labels = x[:, :E].argmax(dim=1)
    share = 1 / labels.bincount(minlength=E)[labels]
    return Activations.of(ffn, x, batch=64, samples=Samples(labels[None], labels, share))


def _check_form(router: Router, found: RouterNetwork) -> None:
    """fp32, finite, and of the shapes that its form says, which is known before anything is made."""
    form = router.form(E)
    assert found.form == form
    assert form.bias is None  # that is the rule's
    shapes = {"rows": (E, form.width or D), "hidden": (form.width, D)}
    for key, weight in (("rows", found.rows), ("hidden", found.hidden)):
        if weight is not None:
            assert (weight.shape, weight.dtype) == (shapes[key], torch.float32)
            assert weight.isfinite().all()
    assert (found.hidden is None) == form.linear
    assert form.elements(E, D) == found.rows.numel() + (0 if found.hidden is None else found.hidden.numel())


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in OF_SOURCES])
def test_ffns_of_every_form_get_rows(name: str, form: FfnForm) -> None:
    cls, ffn = load("router", name), ffn_of(form, 4 * E, D, dtype=torch.float32)
    blueprint = LayerBlueprint(3, tuple(map(ExpertSpec, torch.arange(4 * E).split(4))), top_k=2, scale=1.0)
    router = cls(cls.Parameters(**({"inference_only": True} if name == "zero" else {})))
    found = router.network(blueprint, ffn, generator(0, 3, "router"), tokens(ffn, seed=3))
    _check_form(router, found)
    assert bool(found.rows.any(dim=1).all()) == (name != "zero")


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_are_finite_fp32_of_the_right_shape_and_deterministic(name: str) -> None:
    cls = load("router", name)
    for blueprint, ffn in (given(), telling()):
        given_tokens = tokens(ffn, seed=1)
        router = cls(cls.Parameters())
        first, second = (router.network(blueprint, ffn, generator(0, 0, "router"), given_tokens) for _ in range(2))
        _check_form(router, first)
        assert torch.equal(first.rows, second.rows)
        assert first.hidden is None or torch.equal(first.hidden, second.hidden)


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_weights_means_equal_to_the_last_bit(name: str) -> None:
    cls = load("router", name)
    blueprint, ffn = given()
    found = cls(cls.Parameters()).network(blueprint, ffn, generator(0, 0, "router"), tokens(ffn, seed=1))
    weights = torch.softmax(found.logits(torch.randn(100, D)), dim=-1)
    assert (weights == weights[:, :1]).all().item() is cls.equal_weights


@pytest.mark.parametrize("name", ROUTERS)
def test_calibrated_rows_capture_more_than_random_choices(name: str) -> None:
    cls = load("router", name)
    router = cls(cls.Parameters())
    blueprint, ffn = telling()
    made = router.network(blueprint, ffn, generator(0, 0, "router"), tokens(ffn, seed=1))
    found = captured(tokens(ffn, seed=3), blueprint, made)
    assert found.random < 0.5
    if router.calibrated or name in ("centroid", *OF_SOURCES):  # a centroid of weights reads the layer if not the text
        assert found.captured > 0.8
    weights = torch.softmax(next(tokens(ffn, seed=3).batches()).x @ made.rows.T, dim=-1) if made.form.linear else None
    if weights is not None and hasattr(router.parameters, "tolerance"):
        # These tokens are no longer than an RMSNorm's, so the bound of the cool router holds.
        assert (weights.amax(1) / weights.amin(1) - 1).max() <= router.parameters.tolerance


@pytest.mark.parametrize("name", ROUTERS)
def test_calibrated_routers_ask_for_a_text(name: str) -> None:
    cls = load("router", name)
    router = cls(cls.Parameters())
    if router.calibrated:
        with pytest.raises(UsageError, match=f"the {name} router needs calibration text"):
            router.network(*telling(), generator(0, 0, "router"))
    elif name in OF_SOURCES:
        with pytest.raises(UsageError, match=f"the {name} router needs {router.samples} of every source"):
            router.network(*telling(), generator(0, 0, "router"))
    else:
        _check_form(router, router.network(*telling(), generator(0, 0, "router")))


@pytest.mark.parametrize("bias", [0.0, 2.0])
@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_cool_weights_differ_by_at_most_the_tolerance_on_the_worst_input(tolerance: float, bias: float) -> None:
    """A LayerNorm's bias, which lies nowhere near the worst input, is added on top."""
    blueprint, ffn = given()
    added = bias * torch.randn(D, generator=torch.Generator().manual_seed(8))
    ffn = replace(ffn, norm_bias=added) if bias else ffn
    rows = CoolRouter(CoolParameters(tolerance=tolerance)).rows(blueprint, ffn, generator(0, 0, "router"))
    rows = rows.bfloat16().double()  # as it is stored
    # Worst case for every pair: an input that lies along the difference of their rows, as long as an RMSNorm lets it be.
    worst = 0.0
    for i in range(E):
        for j in range(E):
            seen = (rows[i] - rows[j]) * ffn.norm.double()
            x = seen / seen.norm().clamp(min=1e-30) * D**0.5 * ffn.norm.double()
            weights = torch.softmax((x + added.double()) @ rows.T, -1)
            worst = max(worst, (weights.max() / weights.min() - 1).item())
    assert 0.5 * tolerance < worst <= tolerance


def test_random_rows_have_the_wanted_std() -> None:
    blueprint, ffn = given()
    rows = RandomRouter(RandomParameters(std=0.5)).rows(blueprint, ffn, generator(0, 0, "router"))
    # 512 samples: the sample std is within four standard errors (1/sqrt(2n)) of the true one.
    assert rows.std().item() == pytest.approx(0.5, rel=4 / (2 * rows.numel()) ** 0.5)


def test_zero_router_is_refused_for_training() -> None:
    with pytest.raises(UsageError, match="without noise on its logits the others never learn"):
        ZeroRouter(ZeroRouter.Parameters()).check(experts=8, top_k=4)
    ZeroRouter(ZeroRouter.Parameters()).check(experts=8, top_k=8)
    ZeroRouter(ZeroRouter.Parameters(inference_only=True)).check(experts=8, top_k=4)
    ZeroRouter(ZeroRouter.Parameters(noisy=True)).check(experts=8, top_k=4)
