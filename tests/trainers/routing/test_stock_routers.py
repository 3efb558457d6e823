"""The rule read off a stock router gives what that router gives."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.registry import TARGETS
from upcycle.trainers.routing.stock_routers import find_routers, moe_layers, require_moe_layers, selection_bias

BIASED = {"glm4_moe", "deepseek_v3", "dots1", "solar_open", "ernie4_5_moe", "lfm2_moe"}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((target, {}) for target in TARGETS),
    ("qwen2_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("flex_olmo", {"norm_topk_prob": False}),
    ("glm4_moe", {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    ("dots1", {"routed_scaling_factor": 1.5}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid"}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("lfm2_moe", {"norm_topk_prob": False, "routed_scaling_factor": 2.0}),
]


@pytest.mark.parametrize(("target", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_rule_routes_as_the_stock_router_does(target: str, changes: dict[str, Any], stock: Any) -> None:
    model = stock(target, experts=6, top_k=2, **changes)
    rng = torch.Generator().manual_seed(1)
    for layer in moe_layers(model):
        bias = selection_bias(layer.block, layer.router)
        assert (bias is not None) == (target in BIASED)
        arguments = [torch.randn(200, 32, generator=rng)]
        if bias is not None:
            bias.data.copy_(torch.randn(bias.shape, generator=rng) * 0.2)  # moves the choice, not the weights
            if len(signature(layer.router.forward).parameters) > 1:  # the block keeps the bias and hands it over
                arguments.append(bias)
        with torch.no_grad():
            logits, weights, experts = layer.router(*arguments)
        mine, chosen = layer.rule.route(logits)
        order, expected = chosen.sort(1), experts.sort(1)
        assert torch.equal(order.values, expected.values)
        # fp32: the score, its sum and the division round once each on both sides.
        torch.testing.assert_close(
            mine.gather(1, order.indices), weights.gather(1, expected.indices), rtol=8 * 2**-24, atol=1e-7
        )


def test_probabilities_of_sigmoids_sum_to_one(stock: Any) -> None:
    rule = moe_layers(stock("glm4_moe"))[0].rule
    logits = torch.randn(50, 4, dtype=torch.float64)
    expected = torch.stack([1 / (1 + torch.exp(-row)) / sum(1 / (1 + torch.exp(-z)) for z in row) for row in logits])
    torch.testing.assert_close(rule.probabilities(logits), expected, rtol=1e-14, atol=0)


def test_only_moe_layers_are_found(stock: Any) -> None:
    assert [layer.index for layer in moe_layers(stock("glm4_moe"))] == [1, 2]
    assert [layer.index for layer in moe_layers(stock("mixtral"))] == [0, 1, 2]


def test_a_dense_model_and_groups_are_refused(stock: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    without = stock("qwen3_moe", mlp_only_layers=[0, 1, 2])  # dense, whatever its name says
    for model in (dense, without):
        assert moe_layers(model) == []
        with pytest.raises(UsageError, match="without a single MoE layer"):
            require_moe_layers(model)
    with pytest.raises(UsageError, match="2 groups") as caught:
        moe_layers(stock("glm4_moe", n_group=2))
    assert [place.count for place in find_routers(stock("glm4_moe", n_group=2))] == [4, 4]
    assert "n_group" in str(caught.value.hint)
