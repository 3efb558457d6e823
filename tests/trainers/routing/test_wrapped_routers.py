"""Training reads the routers of wrapped models: with a hidden layer, and with weights of 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import upcycle.models  # noqa: F401
from upcycle.ffn.router_network import LINEAR, RouterForm
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.trainers.routing.stock_routers import moe_layers, unread, untaught_warning

D = 16
MLP = RouterForm(12, "tanh", unit_inputs=True)


def model(rule: RouterRule, router: RouterForm) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=D, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    ffn = ReplacedFfn((("h.0.mlp",),), D, "gelu_new", False, frozenset(), (4,) * 5, 0, False, rule, router=router)
    return AutoModelForCausalLM.from_config(wrapped_config(config, [ffn]))


@pytest.mark.parametrize("router", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize(
    ("rule", "constant"),
    [
        (TopKRule(2), None),
        (TopKRule(2, "sigmoid", False), None),
        (TopKRule(3, "ones", False), 1.0),
        (TopKRule(3, "ones"), 1 / 3),
    ],
    ids=str,
)
def test_the_rule_that_is_read_routes_as_the_router_does(
    rule: TopKRule, constant: float | None, router: RouterForm
) -> None:
    made = model(rule, router)
    (layer,) = moe_layers(made)
    assert (layer.rule.experts, layer.rule.top_k) == (5, rule.top_k)
    assert layer.rule.constant == (None if constant is None else pytest.approx(constant))
    with torch.no_grad():
        logits, weights, experts = layer.router(torch.randn(30, D))
    given = torch.zeros(30, 5).scatter(1, experts, weights)
    own_weights, own = layer.rule.route(logits)
    torch.testing.assert_close(torch.zeros(30, 5).scatter(1, own, own_weights), given)
    warned = untaught_warning(made)
    assert (warned is None) == (constant is None)
    assert warned is None or "scores: ones" in warned


def test_a_varying_number_of_experts_is_not_read() -> None:
    made = model(DynamicKRule(), MLP)
    assert moe_layers(made) == []
    assert "has experts, but what its routers do" in (unread(made) or "")
