"""Dense gradients of routers: the output of the chosen experts, and the gradient of a layer in which all run, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import upcycle.models  # noqa: F401
from upcycle.errors import UsageError
from upcycle.models.experts import expert_outputs
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.stock_routers import moe_layers

D, E, T = 16, 5, 12
RULES: dict[str, RouterRule] = {
    "softmax": TopKRule(2, normalized=False),
    "divided by their sum": TopKRule(2),
    "sigmoid": TopKRule(1, "sigmoid", False),
    "sigmoid over its sum": TopKRule(2, "sigmoid"),
    "times a factor": BiasedTopKRule(2, "sigmoid", factor=2.5),
}


def own(rule: RouterRule) -> Any:
    torch.manual_seed(0)
    ffn = ReplacedFfn((("h.0.mlp",),), D, "gelu_new", False, frozenset({"up", "down"}), (4,) * E, 6, False, rule)
    config = GPT2Config(n_embd=D, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    model = AutoModelForCausalLM.from_config(wrapped_config(config, [ffn])).double().train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model


def scores(rule: Any, logits: torch.Tensor) -> torch.Tensor:
    """What all experts weigh together: the rule with as many experts per token as there are."""
    found = logits.softmax(-1) if rule.scores == "softmax" else logits.sigmoid()
    return getattr(rule, "factor", 1.0) * (found / found.sum(-1, keepdim=True) if rule.normalized else found)


def gradients(layer: Any, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    layer.block.zero_grad()
    x = x.clone().requires_grad_()
    out = layer.block(x)
    (out * upstream).sum().backward()
    found = {name: weight.grad.clone() for name, weight in layer.block.named_parameters() if weight.grad is not None}
    assert x.grad is not None
    return out.detach(), {**found, "x": x.grad}


@pytest.mark.parametrize("name", RULES)
def test_the_routers_gradient_is_that_of_a_dense_layer_and_nothing_else_changes(name: str) -> None:
    rule: Any = RULES[name]
    (layer,) = moe_layers(own(rule))
    block: Any = layer.block
    x, upstream = torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain_out, plain = gradients(layer, x, upstream)
    control = RouterControl(ControlParameters(dense_gradients=True))
    control.attach(layer)
    out, found = gradients(layer, x, upstream)
    control.detach()
    assert torch.equal(out, plain_out)
    with torch.no_grad():
        each = torch.stack(list(expert_outputs(block.experts, x)), 1)  # [T, E, D]
    weight = block.router.weight.detach().requires_grad_()
    read = x.clone().requires_grad_()
    weighed = scores(rule, read @ weight.T)
    ((weighed[..., None] * each).sum(1) * upstream).sum().backward()
    assert weight.grad is not None
    assert read.grad is not None
    torch.testing.assert_close(found["router.weight"], weight.grad, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found["router.weight"], plain["router.weight"], rtol=1e-2)
    for key in plain:
        if key not in ("router.weight", "x"):
            torch.testing.assert_close(found[key], plain[key], rtol=1e-12, atol=0)
    # The input gets what the experts send back, as ever, and the dense gradient through the router.
    sparse = read.detach().requires_grad_()
    with torch.no_grad():
        _, weights, ids = layer.router(sparse)
    (block._whole(sparse, block.experts(sparse, ids, weights)) * upstream).sum().backward()
    assert sparse.grad is not None
    torch.testing.assert_close(found["x"], sparse.grad + read.grad, rtol=1e-10, atol=1e-12)
    assert torch.equal(gradients(layer, x, upstream)[1]["router.weight"], plain["router.weight"])  # detached


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_stock_models_have_them_under_activation_checkpointing_too(target: str, stock: Any, ids: torch.Tensor) -> None:
    def run(checkpointing: bool, **keys: bool) -> tuple[float, torch.Tensor]:
        model = stock(target).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        control = RouterControl(ControlParameters(**keys))
        for layer in moe_layers(model):
            control.attach(layer)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach()), next(moe_layers(model)[-1].router.parameters()).grad

    plain, sparse = run(False)
    loss, dense = run(False, dense_gradients=True)
    assert loss == plain
    assert torch.linalg.norm(dense - sparse) > 0.05 * torch.linalg.norm(sparse)
    again, recomputed = run(True, dense_gradients=True)
    assert again == plain
    torch.testing.assert_close(recomputed, dense, rtol=1e-5, atol=1e-9)


def test_an_evaluated_model_computes_the_chosen_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = moe_layers(own(TopKRule(2)))
    control = RouterControl(ControlParameters(dense_gradients=True))
    control.attach(layer)
    monkeypatch.setattr("upcycle.trainers.routing.dense_gradients.dense_output", None)
    x = torch.randn(T, D, dtype=torch.float64)
    with torch.no_grad():
        layer.block.train()(x)
    layer.block.eval()(x)
    with pytest.raises(TypeError):
        layer.block.train()(x)


@pytest.mark.parametrize(
    ("rule", "keys", "message"),
    [
        (TopKRule(2, "ones"), {}, "always weigh 0.5, so that no router has a gradient"),
        (TopKRule(2), {"noise": "fixed"}, "noise, capacity and the like change what it says"),
        (TopKRule(2), {"capacity_factor": 1.0}, "noise, capacity and the like change what it says"),
        (ThresholdRule(0.5), {}, "run as many as their logits say"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_refused(rule: RouterRule, keys: dict[str, Any], message: str) -> None:
    (layer,) = moe_layers(own(rule))
    with pytest.raises(UsageError, match=message):
        RouterControl(ControlParameters(dense_gradients=True, **keys)).attach(layer)
