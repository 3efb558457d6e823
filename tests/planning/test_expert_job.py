"""The job of a recipe, from configurations alone: nothing is read, written or changed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from upcycle.architectures.dense.llama_like.llama import Llama
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.base import AnyMethod
from upcycle.planning.cost import is_power_of_two
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import PlannedJob, check_tokenizer, method_of
from upcycle.planning.prepare_experts import prepare_experts
from upcycle.recipe.conversion_recipe import parse_recipe

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEXT: dict[str, Any] = {"calibration": {"text": "demo", "tokens": 512}}


def job_of(dtype: str = "bfloat16", **keys: Any) -> ExpertJob:
    """The job of a recipe on a Llama of three layers that lies nowhere."""
    recipe = parse_recipe({"source": "nowhere", **keys}, "test")
    family = Llama()
    dense = family.config(CONFIG)
    specs = {name: TensorSpec(shape, dtype) for name, shape in family.all_stored_specs(dense).items()}
    return prepare_experts(ExpertJob, recipe, method_of(recipe), family, dense, specs)


def test_copies_are_exact_and_hold_every_tensor_once() -> None:
    job = job_of(experts=4, top_k=2)
    assert job.promise == ("exact", "the same function as the dense model")
    assert (job.shape.expert_size, job.shape.moe_layers, job.scale, job.refit) == (64, (0, 1, 2), 1.0, "none")
    assert (job.router_name, job.calibrated, job.sampled, job.undecided) == ("random", False, False, False)
    assert (job.mixing, job.members, job.shared_members, job.working_bytes) == (None, [], [], 0)
    assert [unit.name for unit in job.units] == ["embeddings", "layer 0", "layer 1", "layer 2", "final norm"]
    names = [entry.name for unit in job.units for entry in unit.entries]
    assert len(names) == len(set(names))
    built = {entry.name for unit in job.units for entry in unit.entries if entry.built}
    assert built == {name for name in names if ".block_sparse_moe." in name or ".mlp." in name}


@pytest.mark.parametrize(
    ("keys", "promise", "why"),
    [
        ({"experts": 4, "top_k": 4}, "exact", "the same function"),
        ({"experts": 4, "top_k": 2}, "approximate", "2 of 4 experts run per token"),
        ({"experts": 4, "top_k": 4, "scale": 2.0}, "approximate", "equality needs 4"),
        ({"experts": 4, "top_k": 4, "router": "random"}, "approximate", "does not weigh all experts equally"),
    ],
)
def test_a_split_is_exact_only_where_all_experts_run_alike(keys: dict[str, Any], promise: str, why: str) -> None:
    found, reason = job_of(method="contiguous_split", **keys).promise
    assert found == promise
    assert why in reason


def test_a_scale_that_the_dtype_rounds_makes_the_promise_rounded() -> None:
    split = {"method": "contiguous_split", "experts": 6, "top_k": 6, "pad": True}
    rounded, exact = job_of(**split), job_of("float32", **split)
    assert rounded.promise[0] == "rounded"
    assert str(rounded.rounding).startswith("the factor 6 rounds in")
    assert (exact.promise[0], exact.rounding) == ("exact", None)
    assert [value for value in (0.25, 1, 3, 4, -2) if is_power_of_two(value)] == [0.25, 1, 4]


def test_text_adds_a_fitted_router_a_refit_and_working_bytes() -> None:
    job = job_of(method="contiguous_split", experts=4, top_k=2, **TEXT)
    assert (job.router_name, job.refit, job.calibrated, job.scale) == ("ridge", "down", True, 2.0)
    assert job.calibration_mode == "sequential"
    states, down = 8 * 4 * 512 * 32, 32 * 64 * 2
    assert job.working_bytes == states + 2 * 3 * down
    assert job_of(experts=4, top_k=2, **TEXT).calibrated is False, "copies have no use for it"


def test_a_fraction_becomes_numbers_of_experts() -> None:
    job = job_of(method="contiguous_split", active=0.5, pieces=8, target="qwen2_moe")
    assert (job.recipe.experts, job.recipe.top_k, job.recipe.shared, job.recipe.active) == (5, 1, 3, None)
    with pytest.raises(UsageError, match="copies whole FFNs"):
        job_of(active=0.5)


@pytest.mark.parametrize(("refit", "kinds"), [("down", 1), ("blocks", 3)])
def test_fitted_projections_are_kept_twice_until_all_layers_are_decided(refit: str, kinds: int) -> None:
    job = job_of(method="contiguous_split", experts=4, top_k=2, refit=refit, **TEXT)
    states, matrix = 8 * 4 * 512 * 32, 32 * 64 * 2
    assert job.working_bytes == states + 2 * 3 * kinds * matrix


def test_experts_that_no_engine_gains_from_are_named_with_a_width_that_helps() -> None:
    plan = job_of(method="contiguous_split", experts=8, top_k=4, **TEXT).cost()
    (warning,) = [each for each in plan.warnings if "too narrow" in each]
    assert warning.startswith("experts of 8 neurons")
    assert "--width 32" in warning
    whole = job_of(method="contiguous_split", experts=8, top_k=8).cost()
    assert not [each for each in whole.warnings if "too narrow" in each], "all run: no one gathers"


def test_where_no_target_holds_shared_experts_they_may_be_routed() -> None:
    keys = {"method": "contiguous_split", "experts": 6, "top_k": 2, "shared": 2, "target": "mixtral"}
    job = job_of(shared_unheld="route", **keys)
    assert (job.shape.experts, job.shape.top_k, job.shape.shared) == (8, 4, 0)


def test_the_cost_counts_total_and_active_parameters() -> None:
    plan = job_of(experts=4, top_k=2).cost()
    expert, router = 3 * 32 * 64, 4 * 32
    assert plan.parameters_total - plan.parameters_dense == 3 * (3 * expert + router)
    assert plan.parameters_total - plan.parameters_active == 3 * 2 * expert
    assert plan.flops_per_token - plan.flops_per_token_dense == 2 * 3 * (expert + router)
    assert plan.bytes_output == 2 * plan.parameters_total


def test_a_job_is_a_planned_job_and_changes_no_argument() -> None:
    keys: dict[str, Any] = {"source": "nowhere", "method": "contiguous_split", "active": 0.5, "pieces": 8, **TEXT}
    recipe = parse_recipe({**keys, "target": "qwen2_moe"}, "test")
    method: AnyMethod = method_of(recipe)
    family = Llama()
    dense = family.config(CONFIG)
    specs = {name: TensorSpec(shape, "bfloat16") for name, shape in family.all_stored_specs(dense).items()}
    given = (recipe, vars(method), vars(family), dense, specs)
    before = deepcopy(given)
    job: PlannedJob = prepare_experts(ExpertJob, recipe, method, family, dense, specs)
    job.cost()
    assert given == before
    assert job.recipe != recipe, "the numbers were worked out in a copy"
    assert job.method is method, "it was looked up once"


def test_a_missing_tokenizer_cannot_be_copied() -> None:
    recipe = parse_recipe({"source": "nowhere"}, "test")
    check_tokenizer(recipe, True)
    check_tokenizer(recipe.model_copy(update={"tokenizer": "none"}), False)
    with pytest.raises(UsageError, match="has no tokenizer"):
        check_tokenizer(recipe, False)
