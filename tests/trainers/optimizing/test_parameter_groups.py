"""What trains, and in which group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.registry import TARGETS
from upcycle.trainers.optimizing.parameter_groups import groups, parts, select
from upcycle.trainers.recipe.part_recipes import GroupParameters


@pytest.mark.parametrize("target", TARGETS)
def test_every_parameter_is_router_experts_or_rest(target: str, stock: Any) -> None:
    model = stock(target)
    found = parts(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, part in found.items():
        routed = ".experts." in name
        router = any(word in name for word in (".gate.", ".router.")) and "shared" not in name
        assert part == ("experts" if routed else "router" if router else "rest"), name
    assert {"router", "experts", "rest"} == set(found.values())


def test_select_trains_the_named_parts_and_patterns(stock: Any) -> None:
    model = stock("qwen2_moe")
    for words, expected in (
        (["router"], lambda name: ".mlp.gate." in name),
        (["experts", "router"], lambda name: ".mlp.experts." in name or ".mlp.gate." in name),
        (["*.layers.1.*", "lm_head.weight"], lambda name: ".layers.1." in name or name == "lm_head.weight"),
        (["all"], lambda name: True),
    ):
        chosen = select(model, words)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert trained == set(chosen) == {name for name, _ in model.named_parameters() if expected(name)}
    with pytest.raises(UsageError, match="'routers' matches no parameter") as caught:
        select(model, ["routers"])
    assert "router" in str(caught.value.hint)


def test_the_bias_on_the_choice_never_trains(stock: Any) -> None:
    """ERNIE's is a parameter without gradient: turned on, an optimizer's weight decay would undo the balance."""
    model = stock("ernie4_5_moe")
    chosen = select(model, ["all"])
    assert not any("e_score_correction_bias" in name for name in chosen)
    assert not any(w.requires_grad for name, w in model.named_parameters() if "e_score_correction_bias" in name)


def test_groups_have_their_own_rate_and_weight_decay(stock: Any) -> None:
    model = stock("qwen3_moe")
    select(model, ["all"])
    made = groups(model, GroupParameters(learning_rate=1e-3, router=0.1, experts=2.0, router_weight_decay=0.0))
    by_name = {group["name"]: group for group in made}
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in made] == [
        ("router", pytest.approx(1e-4), 0.0),
        ("experts", 2e-3, 0.1),
        ("rest", 1e-3, 0.1),
        ("rest vectors", 1e-3, 0.0),
    ]
    held = [id(parameter) for group in made for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert all(parameter.ndim == 1 for parameter in by_name["rest vectors"]["params"])
    torch.optim.AdamW(made)


def test_frozen_parameters_are_in_no_group(stock: Any) -> None:
    model = stock("mixtral")
    select(model, ["router"])
    made = groups(model, GroupParameters(learning_rate=1.0))
    assert [(group["name"], len(group["params"])) for group in made] == [("router", 3)]
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing trains"):
        groups(model, GroupParameters(learning_rate=1.0))


def test_a_dense_model_is_all_rest() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    assert set(parts(model).values()) == {"rest"}
    assert len(select(model, ["all"])) == len(list(model.parameters()))
