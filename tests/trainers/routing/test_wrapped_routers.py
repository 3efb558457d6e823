"""Training reads the routers of wrapped models: with a hidden layer, with weights of 1, with a varying number of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import upcycle.models  # noqa: F401
from upcycle.errors import UsageError
from upcycle.ffn.router_network import LINEAR, RouterForm
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.standardized import StandardizedTopKRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.trainers.routing.router_control import ControlParameters, RouterControl
from upcycle.trainers.routing.router_load import load_counts
from upcycle.trainers.routing.router_records import capture
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
        (StandardizedTopKRule(2, spread=1.5), None),
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


@pytest.mark.parametrize("rule", [ReluRule(), ThresholdRule(0.9), ThresholdRule(1.3)], ids=str)
def test_varying_rules_are_read_with_none_in_the_place_of_experts(rule: RouterRule) -> None:
    made = model(rule, LINEAR)
    (layer,) = moe_layers(made)
    x = (20 * torch.randn(2, 15, D)).requires_grad_()
    with capture(made) as recorder, load_counts(made) as counts:
        made.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: (x,))
        made(torch.zeros(2, 15, dtype=torch.long))
        (record,) = recorder.take()
    logits = layer.router(x.flatten(0, 1))[0]
    routed = rule.gates(logits)
    assert 0 < int((routed == 0).sum()) < routed.numel()  # some run, and some do not
    torch.testing.assert_close(record.gates, routed, rtol=0, atol=0)
    torch.testing.assert_close(record.chosen, (routed > 0).float(), rtol=0, atol=0)
    torch.testing.assert_close(layer.rule.route(logits)[0], record.weights, rtol=0, atol=0)
    assert counts[0].tolist() == (routed > 0).sum(0).tolist()
    shares, some = record.load.sum(1), (routed > 0).any(1)
    torch.testing.assert_close(shares, some.float())
    scores = logits.relu() if isinstance(rule, ReluRule) else logits.softmax(-1)
    torch.testing.assert_close(record.probabilities.sum(1), (scores > 0).any(1).float())
    torch.testing.assert_close(record.scores, scores)
    assert record.gates.requires_grad


def test_control_of_a_fixed_number_of_experts_is_refused() -> None:
    with pytest.raises(UsageError, match="as many as their logits say"):
        capture(model(ReluRule(), LINEAR), RouterControl(ControlParameters(capacity_factor=1.0)))
    capture(model(ReluRule(), LINEAR), RouterControl(ControlParameters())).close()


def test_predicted_norms_are_not_read() -> None:
    made = model(DynamicKRule(), MLP)
    assert moe_layers(made) == []
    assert "has experts, but what its routers do" in (unread(made) or "")
