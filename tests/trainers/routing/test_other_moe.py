"""MoE architectures that are no target: their routers are read by what they do, or that they cannot be is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run, steps

from upcycle.errors import UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.experts import has_experts
from upcycle.trainers.optimizing.parameter_groups import parts
from upcycle.trainers.routing.stock_routers import moe_layers, unread, unread_warning

Model = Callable[[str], Path]
SIZES = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "max_position_embeddings": 256, "pad_token_id": None,
}  # fmt: skip
DEEPSEEK = {
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip


def made(model_type: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("olmoe", {}, ("softmax", 2, False, 1.0)),
        ("olmoe", {"norm_topk_prob": True}, ("softmax", 2, True, 1.0)),
        ("deepseek_v3", {**DEEPSEEK, "routed_scaling_factor": 2.5}, ("sigmoid", 2, True, 2.5)),
    ],
)
def test_a_router_is_recognised_by_its_outputs(
    model_type: str, changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    model = made(model_type, **changes)
    layers = moe_layers(model)
    rule = layers[-1].rule
    assert (rule.score, rule.top_k, rule.normalized, rule.factor) == expected
    assert len(layers) == 2 - changes.get("first_k_dense_replace", 0)
    logits, weights, chosen = layers[-1].router(torch.randn(5, 32))
    own_weights, own = rule.route(logits)
    order, own_order = chosen.argsort(-1), own.argsort(-1)
    assert torch.equal(chosen.gather(1, order), own.gather(1, own_order))
    torch.testing.assert_close(weights.gather(1, order), own_weights.gather(1, own_order), rtol=1e-4, atol=1e-6)
    assert set(parts(model).values()) == {"router", "experts", "rest"}


def test_routers_that_cannot_be_read_are_named() -> None:
    with pytest.raises(UsageError, match=r"deepseek_v3 router that chooses experts within 2 groups \(n_group\)"):
        moe_layers(made("deepseek_v3", **{**DEEPSEEK, "n_group": 2, "topk_group": 1}))
    changes = {**DEEPSEEK, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
    grouped = made("deepseek_v2", **changes)
    assert moe_layers(grouped) == []
    assert has_experts(grouped)
    assert "deepseek_v2 has experts, but what its routers do is none of the rules" in str(unread_warning(grouped))
    dense = made("llama")
    assert moe_layers(dense) == []
    assert not has_experts(dense)
    assert unread(dense) is None
    assert unread_warning(dense) is None


@pytest.fixture
def olmoe(pico_moe: Model, tmp_path: Path) -> Path:
    folder = tmp_path / "olmoe"
    made("olmoe").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pico_moe("mixtral") / name, folder)
    return folder


@pytest.mark.long
def test_olmoe_trains_with_balance_and_load(olmoe: Path, tmp_path: Path) -> None:
    recipe = recipe_for(olmoe, tmp_path, stage={"steps": 2}, saving={"every": 9, "export": True})
    result, _ = run(recipe)
    for line in steps(recipe):
        assert line["loss/switch_balance"] >= 0.0199  # two layers, each at least 1, times 0.01
        assert len(line["load_max_over_mean"]) == 2
    assert result.model
    assert set(SafetensorsFolder(Path(result.model)).specs) == set(SafetensorsFolder(olmoe).specs)
    recipe = recipe_for(olmoe, tmp_path / "router", zero={"stage": 3}, stage={"steps": 1, "train": ["router"]})
    assert run(recipe)[0].step == 1


@pytest.mark.parametrize("named", ["mixtral", "olmoe", "dense"])
def test_an_implementation_that_is_not_there_is_refused_for_every_model(
    named: str, pico_moe: Model, pico: Model, olmoe: Path, tmp_path: Path
) -> None:
    model = {"mixtral": pico_moe("mixtral"), "olmoe": olmoe, "dense": pico("llama")}[named]
    with pytest.raises(UsageError, match="experts: transformers has no 'no_such_kernel'"):
        run(recipe_for(model, tmp_path, experts="no_such_kernel", stage={"steps": 1, "losses": {}}))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({}, "losses.switch_balance: llama is a dense model, without routers"),
        ({"losses": {}, "balance": {}}, "balance: llama is a dense model"),
        ({"losses": {}, "control": {"jitter": 0.1}}, "control: llama is a dense model"),
    ],
)
def test_what_reads_routers_is_refused_where_there_is_none(
    pico: Model, tmp_path: Path, stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(recipe_for(pico("llama"), tmp_path, stage=stage))
