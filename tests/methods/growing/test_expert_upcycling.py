"""Expert upcycling: what copies do to the function, which experts are copied, and the noise on their rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_models import COMMON, PICO_MOE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.moe_families import MOES
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.growing.expert_upcycling import ExpertUpcycling, ExpertUpcyclingParameters

Models = Callable[..., Path]
QUICK: dict[str, Any] = {"tokenizer": "none", "verification": {"tokens": 64}}
E, K, M = 4, 2, 3  # of the pico models, and how often each expert is there afterwards


def routed(logits: np.ndarray, outputs: np.ndarray, top_k: int, scores: str, normalized: bool) -> np.ndarray:
    """A stock MoE block of one token in fp64: top-k of the scores, their outputs weighted, expert by expert."""
    exponentials = [math.exp(z) for z in logits]
    total = sum(exponentials)
    values = [e / total for e in exponentials] if scores == "softmax" else [1 / (1 + math.exp(-z)) for z in logits]
    chosen = sorted(range(len(values)), key=lambda e: -values[e])[:top_k]
    divisor = sum(values[e] for e in chosen) if normalized else 1.0
    return np.sum([values[e] / divisor * outputs[e] for e in chosen], axis=0)


def same_as(top_k: int, scores: str, normalized: bool) -> int:
    """The top-k of the source that M copies of each of E experts with so many slots are on every token; 0: none."""
    rng, found = np.random.default_rng(0), set(range(1, E + 1))
    for _ in range(20):
        logits, outputs = rng.standard_normal(E), rng.standard_normal((E, 4))
        grown = routed(np.tile(logits, M), np.tile(outputs, (M, 1)), top_k, scores, normalized)
        sources = {k: routed(logits, outputs, k, scores, normalized) for k in found}
        found = {k for k, source in sources.items() if np.allclose(grown, source, rtol=1e-12, atol=1e-12)}
    assert len(found) <= 1
    return found.pop() if found else 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "scores", "normalized"),
    [
        ("mixtral", "softmax", True),
        ("qwen2_moe-softmax", "softmax", False),
        ("dots1", "sigmoid", True),
        ("glm4_moe-sigmoid", "sigmoid", False),
    ],
)
def test_what_is_promised_is_what_copies_compute(name: str, scores: str, normalized: bool, pico_moe: Models) -> None:
    """Against a block of one token in fp64, for every number of slots."""
    for top_k in range(1, M * E + 1):
        keys = {"method": "expert_upcycling", "experts": M * E, "top_k": top_k, "parameters": {"noise": 0.0}}
        plan = upcycle.plan(str(pico_moe(name)), tokenizer="none", **keys)
        same = same_as(top_k, scores, normalized)
        assert (plan.promise == "exact") == (same == K), top_k
        told = re.search(r"as in the source with top-(\d+)$", plan.promise_reason)
        assert (int(told[1]) if told else 0) == (0 if same == K else same), (top_k, plan.promise_reason)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in PICO_MOE if not name.startswith("phimoe")])
def test_as_many_slots_as_copies_keep_the_function(name: str, fused: bool, pico_moe: Models, tmp_path: Path) -> None:
    keys = {"method": "expert_upcycling", "experts": 12, "top_k": 6, "parameters": {"noise": 0.0}}
    result = upcycle.convert(str(pico_moe(name, fused)), tmp_path / "out", **keys, **QUICK).verification
    assert result is not None
    if name.endswith("-sigmoid") or name.startswith(
        "ernie"
    ):  # not normalised: all counts three times; a bias on shares, too
        assert result.verdict == "approximate"
        assert result.relative_logit_error > 1e-2
    else:
        assert result.verdict == "exact"
        assert result.relative_logit_error < 2e-6  # fp32, two layers: a few roundings of 6e-8 each


def test_a_router_that_always_chooses_two_gets_no_more_slots(pico_moe: Models, tmp_path: Path) -> None:
    keys = {"method": "expert_upcycling", "experts": 8, "parameters": {"noise": 0.0}}
    with pytest.raises(RefusalError, match="top_k 4: a 'phimoe' router always chooses 2 experts"):
        upcycle.plan(str(pico_moe("phimoe")), **keys, top_k=4, tokenizer="none")
    plan = upcycle.plan(str(pico_moe("phimoe-constant")), **keys, tokenizer="none")
    assert (plan.promise, plan.promise_reason) == (
        "approximate",
        "SparseMixer chooses copies of one expert, and divides the first weight among them",
    )


def test_with_top_k_fixed_the_result_is_the_source_with_fewer_experts(pico_moe: Models, tmp_path: Path) -> None:
    keys = {"method": "expert_upcycling", "parameters": {"noise": 0.0}}
    result = upcycle.convert(str(pico_moe("mixtral")), tmp_path / "out", **keys, **QUICK)
    assert result.plan.promise_reason == "copies of one expert share the 2 slots, as in the source with top-1"
    ids = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        grown = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        one = AutoModelForCausalLM.from_pretrained(pico_moe("mixtral"), dtype=torch.float32, num_experts_per_tok=1)
        expected = one(ids).logits
        two = AutoModelForCausalLM.from_pretrained(pico_moe("mixtral"), dtype=torch.float32)(ids).logits
    assert torch.linalg.norm(grown - expected) < 2e-6 * torch.linalg.norm(expected)
    assert torch.linalg.norm(two - expected) > 1e-2 * torch.linalg.norm(expected)


@pytest.mark.parametrize(
    ("keys", "promise", "reason"),
    [
        ({"top_k": 4, "parameters": {"noise": 0.0}}, "exact", "the 4 chosen are all copies of the 2"),
        ({"top_k": 4}, "approximate", "noise of 0.01"),
        ({}, "approximate", "as in the source with top-1"),
        ({"top_k": 3, "parameters": {"noise": 0.0}}, "approximate", "share the 3 slots"),
        ({"experts": 6, "parameters": {"utility": "norm", "noise": 0.0}}, "approximate", "more of the 2 slots"),
    ],
)
def test_promises(keys: dict[str, Any], promise: str, reason: str, pico_moe: Models) -> None:
    plan = upcycle.plan(str(pico_moe("mixtral")), method="expert_upcycling", tokenizer="none", **keys)
    assert plan.promise == promise
    assert reason in plan.promise_reason


@pytest.mark.parametrize("seed", [0, 1])
def test_the_most_useful_experts_are_copied_first(seed: int) -> None:
    utility = np.random.default_rng(seed).random(6)
    utility[4] = utility[1]  # of equals the first
    for experts in range(7, 6 * 4 + 1):
        method = ExpertUpcycling(ExpertUpcyclingParameters(utility="norm", most_copies=3))
        copies = [0] * 6
        for _ in range(experts - 6):
            best = max((e for e in range(6) if copies[e] < 3), key=lambda e: (utility[e], -e))
            copies[best] += 1
        found = method.chosen(utility, experts)
        assert found[:6] == list(range(6))
        assert [found[6:].count(e) for e in range(6)] == copies


def test_noise_is_on_the_added_rows_alone_and_as_large_as_asked_for(pico_moe: Models, tmp_path: Path) -> None:
    rows = {}
    for name, own in {"one": {}, "same": {}, "other": {"seed": 1}, "more": {"experts": 16}}.items():
        parameters = {"noise": 0.1, **({"utility": "norm", "most_copies": 3} if name == "more" else {})}
        keys = {"method": "expert_upcycling", "parameters": parameters, **own, **QUICK}
        upcycle.convert(str(pico_moe("qwen3_moe")), tmp_path / name, **keys)
        rows[name] = load_file(tmp_path / name / "model.safetensors")
    stored = load_file(pico_moe("qwen3_moe") / "model.safetensors")
    for layer in range(2):
        key = f"model.layers.{layer}.mlp.gate.weight"
        before, after = stored[key].double().numpy(), rows["one"][key].double().numpy()
        assert np.array_equal(after[:4], before)
        noise = (after[4:] - before) / (0.1 * np.sqrt(((before - before.mean()) ** 2).mean()))
        # 128 standard normal numbers: their deviation is within 5 / sqrt(2 * 128) of 1, five standard errors.
        assert abs(noise.std() - 1) < 0.32
        assert torch.equal(rows["one"][key], rows["same"][key])
        assert not torch.equal(rows["one"][key], rows["other"][key])
        assert len(rows["more"][key].unique(dim=0)) == 16  # copies of one expert differ from each other
    assert not torch.equal(rows["one"]["model.layers.0.mlp.gate.weight"][4:] - stored["model.layers.0.mlp.gate.weight"],
                           rows["one"]["model.layers.1.mlp.gate.weight"][4:] - stored["model.layers.1.mlp.gate.weight"])  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoe", "mixtral"])
def test_numbers_of_the_plan_are_those_of_the_model(name: str, pico_moe: Models, tmp_path: Path) -> None:
    result = upcycle.convert(str(pico_moe(name)), tmp_path / "out", method="expert_upcycling", **QUICK)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (pico_moe(name), tmp_path / "out")]
    before, after = (
        {
            n: p.numel()
            for n, p in model.named_parameters()
            if "lm_head" not in n or not model.config.tie_word_embeddings
        }
        for model in models
    )
    plan = result.plan
    assert (plan.parameters_dense, plan.parameters_total) == (sum(before.values()), sum(after.values()))
    routed_before, routed_after = (
        sum(count for n, count in numbers.items() if ".experts." in n) for numbers in (before, after)
    )
    assert plan.parameters_active == plan.parameters_total - routed_after * 6 // 8
    used = sum(before.values()) - routed_before * 2 // 4 - 4096 * 32
    assert plan.flops_per_token_dense == 2 * used
    layers = 1 if name == "qwen2_moe" else 2  # its first layer is dense
    assert plan.flops_per_token == 2 * (used + layers * 4 * 32)  # the router's new rows


def test_what_was_decided_is_reported(pico_moe: Models, tmp_path: Path) -> None:
    keys = {"method": "expert_upcycling", "experts": 6, "parameters": {"utility": "norm"}}
    result = upcycle.convert(str(pico_moe("qwen2_moe")), tmp_path / "out", **keys, **QUICK)
    (layer,) = result.layers
    assert layer["layer"] == 1
    assert layer["experts"][4:] == 2 * [int(np.argmax(layer["utility"]))]
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["experts"] == {"1": layer["experts"]}


@pytest.mark.parametrize(
    ("name", "keys", "message", "hint"),
    [
        ("mixtral", {"experts": 4}, "has 4 experts already, and 4 are asked for", "--experts 8"),
        ("mixtral", {"experts": 3}, "has 4 experts already, and 3 are asked for", "--experts 8"),
        ("mixtral", {"experts": 6}, "6 experts are no multiple of 4", "utility=norm"),
        ("mixtral", {"top_k": 9}, "top_k is 9, but there are only 8 experts", "--top-k"),
        ("mixtral", {"experts": 17, "parameters": {"utility": "norm"}}, "more than 3 copies", "most_copies=4"),
        ("mixtral", {"parameters": {"utility": "load"}}, "utility=load looks at text", "--calibration"),
        ("mixtral", {"parameters": {"noise": -1}}, "key 'noise'", "noise"),
        ("mixtral", {"dtype": "bfloat16"}, "does not read the key 'dtype'", "experts"),
    ],
)
def test_bad_input(name: str, keys: dict[str, Any], message: str, hint: str, pico_moe: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        upcycle.convert(str(pico_moe(name)), tmp_path / "out", method="expert_upcycling", **keys)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_refused_with_what_makes_a_moe_of_it(pico: Models, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="is a dense 'llama' model, and a Mixture-of-Experts is needed") as caught:
        upcycle.convert(str(pico("llama")), tmp_path / "out", method="expert_upcycling")
    assert "--method sparse_upcycling" in (caught.value.hint or "")


def test_text_that_is_not_looked_at_is_warned_of(pico_moe: Models) -> None:
    plan = upcycle.plan(str(pico_moe("mixtral")), method="expert_upcycling", calibration="demo")
    assert any("calibration text is not used" in warning for warning in plan.warnings)


def test_a_hub_id_is_planned_from_its_config_alone(
    pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_bytes((pico_moe("granitemoe") / "config.json").read_bytes())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    there = upcycle.plan("org/name", method="expert_upcycling").as_dict()
    here = upcycle.plan(str(pico_moe("granitemoe")), method="expert_upcycling").as_dict()
    for key in ("parameters_total", "parameters_active", "bytes_output", "flops_per_token", "promise_reason"):
        assert there[key] == here[key]


def test_every_known_architecture_is_refused_by_other_methods_with_the_hint() -> None:
    from upcycle.checkpoints.find_family import family_of
    from upcycle.registry import FAMILIES

    for name in set(MOES) - set(FAMILIES):  # what may be dense says it when it reads the configuration
        with pytest.raises(RefusalError, match="Mixture-of-Experts already") as caught:
            family_of({"model_type": name}, "here")
        assert "--method expert_upcycling" in (caught.value.hint or "")
    for name in set(MOES) & set(FAMILIES):
        with pytest.raises(RefusalError, match="Mixture-of-Experts already"):
            family_of({"model_type": name}, "here").config(
                {"model_type": name, **COMMON, "num_local_experts": 4}, "here"
            )
