"""Routers with and without a hidden layer: the formula in fp64, what is kept of them, and a layer under any rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ffn_forms import FORMS, ffn_of

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import BlueprintFile, ExpertSpec, LayerBlueprint, join_blueprints, save_blueprint
from upcycle.ffn.refit import Routing
from upcycle.ffn.router_network import LINEAR, RouterForm, RouterNetwork
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.models.own.routing.top_k import TopKRule

T, D, H, E, M = 9, 6, 5, 4, 3
NETWORKS = {
    "linear": LINEAR,
    "biased": RouterForm(bias=1.0),
    "d2d": RouterForm(H, "relu", absolute=True),
    "moefication": RouterForm(H, "tanh", unit_inputs=True),
}
RULES: list[Any] = [
    DynamicKRule(0.5),
    ThresholdRule(0.8),
    ReluRule(),
    TopKRule(2, "sigmoid", False),
    TopKRule(2, "ones", False),
    TopKRule(E, "sigmoid", False),
]


def network(form: RouterForm, dtype: torch.dtype = torch.float64) -> RouterNetwork:
    rng = torch.Generator().manual_seed(4)
    hidden = None if form.linear else torch.randn(H, D, generator=rng, dtype=torch.float64).to(dtype)
    return RouterNetwork(torch.randn(E, form.width or D, generator=rng, dtype=torch.float64).to(dtype), hidden, form)


def tokens(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def restated(router: RouterNetwork, x: np.ndarray) -> np.ndarray:
    form, z = router.form, x
    if form.unit_inputs:
        z = z / np.sqrt((z**2).sum(1, keepdims=True))
    if router.hidden is not None:
        z = z @ router.hidden.numpy().T
        z = np.tanh(z) if form.activation == "tanh" else np.maximum(z, 0)
    z = z @ router.rows.numpy().T + (form.bias or 0.0)
    return np.abs(z) if form.absolute else z


@pytest.mark.parametrize("form", NETWORKS.values(), ids=list(NETWORKS))
def test_logits_are_those_of_the_formula_in_the_block_too(form: RouterForm) -> None:
    router, x = network(form), tokens()
    expected = torch.from_numpy(restated(router, x.numpy()))
    torch.testing.assert_close(router.logits(x), expected, rtol=1e-12, atol=1e-12)
    ffn = ReplacedFfn(
        (("mlp",),), D, "relu", False, frozenset(), (2,) * E, 0, form.bias is not None, DynamicKRule(), router=form
    )
    block: Any = MoeBlock(ffn).double()
    state = {"router.weight": router.rows} | ({} if router.hidden is None else {"router.hidden.weight": router.hidden})
    state |= {} if form.bias is None else {"router.bias": torch.full((E,), form.bias, dtype=torch.float64)}
    missing, unexpected = block.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("router")]
    torch.testing.assert_close(block.router(x)[0], expected, rtol=1e-12, atol=1e-12)
    assert form.elements(E, D) == sum(weight.numel() for weight in block.router.parameters())


def test_stored_weights_are_rounded_in_both_layers() -> None:
    router = network(NETWORKS["d2d"], torch.float32)
    stored = router.stored_as(torch.bfloat16)
    assert stored.hidden is not None
    assert router.hidden is not None
    assert torch.equal(stored.hidden, router.hidden.bfloat16().float())
    assert not torch.equal(stored.hidden, router.hidden)
    assert torch.equal(stored.rows, router.rows.bfloat16().float())


@pytest.mark.parametrize("form", NETWORKS.values(), ids=list(NETWORKS))
def test_a_saved_blueprint_has_the_whole_router(form: RouterForm, tmp_path: Path) -> None:
    router = network(form, torch.float32)
    experts = tuple(ExpertSpec(neurons) for neurons in torch.arange(E * M).split(M))
    blueprint = LayerBlueprint(
        2, experts, E, 1.0, router=router.rows, router_hidden=router.hidden, router_form=form, rule=DynamicKRule()
    )
    save_blueprint(tmp_path / "one", blueprint)
    join_blueprints([tmp_path / "one"], tmp_path / "all", {})
    read = BlueprintFile(tmp_path / "all").layer(2)
    assert read.router_form == form
    assert torch.equal(read.network.logits(tokens(torch.float32)), router.logits(tokens(torch.float32)))
    assert read.rule is None  # the recipe says it


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_refit_sees_the_layer_that_the_model_computes(rule: Any, shared: int) -> None:
    """Activations under the rule times the stored down projections, against the block that is written."""
    form, width = FORMS["gated"], (E + shared) * M
    ffn, x = ffn_of(form, width, D, dtype=torch.float32), tokens(torch.float32)
    specs = [ExpertSpec(neurons) for neurons in torch.arange(width).split(M)]
    router = network(replace(NETWORKS["d2d"], bias=rule.router_bias), torch.float32)
    made = LayerBlueprint(
        0, tuple(specs[shared:]), E, 1 / rule.equal_weight(E), tuple(specs[:shared]), router.rows,
        router_hidden=router.hidden, router_form=router.form, rule=rule,
    )  # fmt: skip
    routing = Routing(made, ffn)
    (batch,) = Activations.of(ffn, x).batches()
    found = routing.active(batch) @ routing.stored(made).T
    logits = router.logits(x)
    gates = rule.gates(logits).repeat_interleave(M, dim=1) / rule.equal_weight(E)
    gates = torch.cat([torch.ones(T, shared * M), gates], dim=1)
    expected = (batch.hidden * gates) @ ffn.down.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert made.plain_scale == made.scale
