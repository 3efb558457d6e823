"""The plan against what a conversion then writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.conversion.jobs import job_of
from upcycle.errors import UpcycleError, UsageError
from upcycle.recipe.conversion_recipe import parse_recipe

Pico = Callable[[str], Path]
ACTIVE: dict[str, Any] = {"method": "random_split"}


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"experts": 4, "top_k": 2}),
        ("llama", {"method": "random_split", "top_k": 4, "shared": 4}),
        ("llama-rope", {"method": "random_split", "top_k": 2}),
        ("qwen3", {"experts": 4, "top_k": 1, "layers": "every-other", "layout": "fused"}),
        ("gemma", {"experts": 4, "top_k": 2, "target": "mixtral"}),
    ],
)
def test_parameters_and_bytes_are_those_of_the_written_model(
    name: str, keys: dict[str, Any], pico: Pico, tmp_path: Path
) -> None:
    plan = upcycle.plan(str(pico(name)), max_shard_size="300KB", **keys)
    result = upcycle.convert(
        str(pico(name)), tmp_path / "out", max_shard_size="300KB", verification={"tokens": 64}, **keys
    )
    assert result.plan == plan
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert plan.parameters_total == total
    assert plan.parameters_active == total - idle + idle * keys["top_k"] // keys.get("experts", 8)
    dense = AutoModelForCausalLM.from_pretrained(pico(name))
    assert plan.parameters_dense == sum(p.numel() for p in dense.parameters())
    sizes = {shard["file"]: shard["bytes"] for shard in plan.shards}
    for file, size in sizes.items():
        # The file holds the tensors and a header.
        content = (tmp_path / "out" / file).read_bytes()
        assert len(content) - 8 - int.from_bytes(content[:8], "little") == size
    assert sum(sizes.values()) == plan.bytes_output


def test_flops_count_every_weight_in_a_product_twice(pico: Pico) -> None:
    plan = upcycle.plan(str(pico("llama")), experts=4, top_k=2)
    ffn = 3 * 3 * 32 * 96  # layers x matrices x hidden x intermediate
    assert plan.flops_per_token - plan.flops_per_token_dense == 2 * (ffn + 3 * 4 * 32)
    assert plan.flops_per_token_dense == 2 * (plan.parameters_dense - 4096 * 32)


def test_a_head_that_is_untied_is_a_product_where_the_tied_one_was(pico: Pico) -> None:
    tied, untied = (
        upcycle.plan(str(pico("gemma")), experts=4, top_k=2, target=name) for name in ("granitemoe", "mixtral")
    )
    assert untied.parameters_total - tied.parameters_total == 4096 * 32
    assert untied.flops_per_token == tied.flops_per_token
    note = "mixtral multiplies no embeddings: they are written times 5.657 in float32, 1 MB (--target granitemoe does)"
    assert note in untied.warnings
    assert not any("embeddings" in warning for warning in tied.warnings)


def test_a_hub_id_is_planned_from_its_config_alone(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    wanted: list[list[str]] = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        (tmp_path / "config.json").write_bytes((pico("llama") / "config.json").read_bytes())
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    there, here = upcycle.plan("org/name", experts=4), upcycle.plan(str(pico("llama")), experts=4)
    assert wanted == [["config.json"]]
    assert there == here


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"method": "random_split", "top_k": 4}, "healed"),
        ({"experts": 4, "top_k": 2}, "runs 2 copies"),
        ({"method": "random_split", "experts": 7, "top_k": 7, "pad": True, "dtype": "bfloat16"}, "rounds in bfloat16"),
        ({"method": "random_split", "experts": 7, "top_k": 7, "pad": True}, "16 zero neurons per layer"),
        ({"calibration": "demo"}, "calibration text is not used"),
        ({"experts": 8, "max_shard_size": "10KB"}, "a layer is never divided"),
        ({"method": "random_split", "experts": 8, "top_k": 8}, "not a multiple of 8"),
    ],
)
def test_a_plan_warns_of_what_the_user_may_not_expect(keys: dict[str, Any], part: str, pico: Pico) -> None:
    assert any(part in warning for warning in upcycle.plan(str(pico("llama")), **keys).warnings)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("keys", "promise"),
    [
        ({"experts": 4, "top_k": 2}, "exact"),
        ({"experts": 4, "top_k": 2, "router": "cool"}, "exact"),
        ({"method": "random_split", "top_k": 8}, "exact"),
        ({"method": "random_split", "top_k": 8, "router": "random"}, "approximate"),
        ({"method": "random_split", "top_k": 8, "scale": 2.0}, "approximate"),
        ({"method": "random_split", "experts": 6, "top_k": 6}, "exact"),  # the pico model is fp32
        ({"method": "random_split", "experts": 6, "top_k": 6, "dtype": "bfloat16"}, "rounded"),
        ({"method": "random_split", "top_k": 4}, "approximate"),
    ],
)
def test_a_plan_states_the_promise_of_its_recipe(keys: dict[str, Any], promise: str, pico: Pico) -> None:
    assert upcycle.plan(str(pico("llama")), **keys).promise == promise


def test_shared_experts_that_leave_nothing_to_route_are_refused(pico: Pico) -> None:
    with pytest.raises(UsageError, match="40 shared experts of 8 neurons leave 0 of 96 neurons for 8 routed experts"):
        upcycle.plan(str(pico("llama")), method="random_split", shared=40, pad=True)


def test_a_fraction_sets_the_sizes_and_counts_layers_that_stay_dense(pico: Pico) -> None:
    # 96 neurons: 12 pieces of 8. Two of three layers are split, so that (1 + 2 * 5/12) / 3 = 61% run; 4/12 would be 56%.
    job = job_of(
        parse_recipe(ACTIVE | {"source": str(pico("llama")), "active": 0.6, "layers": "except-first:1"}, "test")
    )
    assert (job.shape.shared + job.shape.top_k, job.shape.experts + job.shape.shared) == (5, 12)
    assert job.shape.shared == 4, "80% of 5"
    everywhere = job_of(parse_recipe(ACTIVE | {"source": str(pico("llama")), "active": 0.6}, "test"))
    assert everywhere.shape.shared + everywhere.shape.top_k == 7


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"active": 0.1, "layers": "except-first:1"}, "would run 0 of 12 experts in each of 2 layers"),
        ({"active": 0.5, "method": "sparse_upcycling"}, "copies whole FFNs"),
        ({"active": 1.5}, "less than 1"),
    ],
)
def test_fractions_that_make_no_split_are_refused(keys: dict[str, Any], message: str, pico: Pico) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(str(pico("llama")), **{**ACTIVE, **keys})


def test_a_target_without_shared_experts_routes_them_where_that_is_allowed(pico: Pico) -> None:
    keys = {"method": "random_split", "shared": 4, "experts": 8, "top_k": 2, "target": "qwen3_moe"}
    job = job_of(parse_recipe({**keys, "source": str(pico("qwen3")), "shared_unheld": "route"}, "test"))
    assert (job.shape.shared, job.shape.experts, job.shape.top_k) == (0, 12, 6)
    with pytest.raises(UpcycleError, match="cannot hold shared experts"):
        upcycle.plan(str(pico("qwen3")), **keys)


def test_a_calibration_is_planned_with_its_memory(pico: Pico) -> None:
    keys = {"method": "random_split", "shared": 4, "top_k": 4}
    plain = upcycle.plan(str(pico("llama")), **keys)
    calibrated = upcycle.plan(str(pico("llama")), **keys, calibration="demo")
    assert (plain.router, plain.refit, plain.calibration_tokens) == ("cool", "none", 0)
    assert (calibrated.router, calibrated.refit, calibrated.calibration_tokens) == ("ridge", "down", 65536)
    assert calibrated.peak_memory_bytes > plain.peak_memory_bytes


def test_experts_that_do_not_divide_offer_padding(pico: Pico) -> None:
    with pytest.raises(UsageError, match="96 neurons do not divide into 7 routed") as caught:
        upcycle.plan(str(pico("llama")), method="random_split", experts=7)
    assert "--pad fills up to 112" in (caught.value.hint or "")
