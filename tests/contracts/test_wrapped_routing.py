"""Routing rules and routers with a hidden layer, as a recipe asks for them: exact with every expert on, and refused elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from wrapped_models import relative_error, small_model

import upcycle
import upcycle.models
from upcycle.errors import RefusalError, UsageError
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.routing.rules import RULES

pytestmark = pytest.mark.one_in(8)  # the other cases are long

E = 8
# Rules that conversions of dense models to experts do not write: test_wrapped_moe.py, test_beside.py
OF_COMPRESSED = {"biased_top_k", "skip", "tempered"}
QUICK: dict[str, Any] = {"tokenizer": "none", "verification": {"tokens": 64}}
SPLIT: dict[str, Any] = {"method": "random_split", "experts": E, "target": "upcycle_moe", **QUICK}
TEXT = {"text": "prose", "tokens": 2048, "window": 64}
ROUNDING = 2e-6  # fp32, two or three layers: a few roundings of 6e-8 each
# What runs every expert at one weight, whatever the token is.
ALL_ON: dict[str, dict[str, Any]] = {
    "dynamic_k": {"routing": {"rule": "dynamic_k", "tau": 0}, "router": "random"},
    "dynamic_k of equal norms": {"routing": {"rule": "dynamic_k", "tau": 0.7}, "router": "zero"},
    "threshold": {"routing": "threshold", "router": "zero"},
    "relu": {"routing": "relu", "router": "zero"},
    "causal_choice": {"routing": {"rule": "causal_choice", "threshold": 0}, "router": "zero"},
    "causal_choice, untaught": {"routing": "causal_choice", "router": "zero"},
    "expert_choice": {"routing": {"rule": "expert_choice", "capacity_factor": E}, "router": "zero"},
    "expert_choice, plain": {
        "routing": {"rule": "expert_choice", "capacity_factor": E, "normalized": False, "group": "batch"},
        "router": "zero",
    },
    "top_k, ones": {"routing": {"scores": "ones", "normalized": False}, "top_k": E, "router": "random"},
    "top_k, ones over K": {"routing": {"scores": "ones"}, "top_k": E, "router": "random"},
    "top_k, sigmoid": {"routing": {"scores": "sigmoid"}, "top_k": E, "router": "zero"},
    "top_k, plain sigmoid": {"routing": {"scores": "sigmoid", "normalized": False}, "top_k": E, "router": "zero"},
    "top_k, plain softmax": {"routing": {"normalized": False}, "top_k": E, "router": "zero"},
    "top_k of normalised logits": {"routing": {"spread": 1}, "top_k": E, "router": "zero"},
}


def source(name: str, pico: Callable[[str], Path], folder: Path) -> Path:
    """GPT-2 has biases and no gate, Falcon two norms; Llama has stock targets, too."""
    if name == "llama":
        return pico("llama")
    small_model(name).save_pretrained(folder / "dense")
    return folder / "dense"


def logits(folder: Path, ids: torch.Tensor, head: Any = AutoModelForCausalLM, **more: Any) -> torch.Tensor:
    """Of a folder loaded as any user would."""
    model, report = head.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    assert not any(report.values()), report
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def ids() -> torch.Tensor:
    return torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(3))


def test_every_rule_is_asked_for() -> None:
    asked = set()
    for keys in ALL_ON.values():
        routing = {"rule": keys["routing"]} if isinstance(keys["routing"], str) else keys["routing"]
        asked.add("standardized_top_k" if "spread" in routing else routing.get("rule", "top_k"))
    assert asked == set(RULES) - OF_COMPRESSED


def of_encoders(keys: dict[str, Any]) -> bool:
    return "expert_choice" in str(keys["routing"])


@pytest.mark.one_in(8)
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize(
    ("name", "keys"),
    [(name, keys) for name in ("gpt2", "falcon", "llama") for keys in ALL_ON.values() if not of_encoders(keys)],
    ids=str,
)
def test_all_experts_on_is_the_dense_model(
    name: str, keys: dict[str, Any], shared: int, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = source(name, pico, tmp_path)
    told = {**SPLIT, **keys, "shared": 2 * shared, "pad": bool(shared)}
    result = upcycle.convert(str(dense), tmp_path / "out", **told).verification
    assert result is not None
    assert (result.promise, result.verdict) == ("exact", "exact")
    assert relative_error(logits(tmp_path / "out", ids()), logits(dense, ids())) < ROUNDING
    assert min(result.neurons_run) >= 1  # padded neurons run, too


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in OF_COMPRESSED])
def test_copies_under_every_rule_are_the_dense_model(rule: str, tmp_path: Path, pico: Callable[[str], Path]) -> None:
    """They are averaged: each of E copies with every expert on adds one E-th, and GPT-2's biases count once."""
    encoder = not RULES[rule].per_token
    dense = source("bert" if encoder else "gpt2", pico, tmp_path)
    routing: dict[str, Any] = {"scores": "sigmoid", "normalized": False} if rule == "top_k" else {"rule": rule}
    routing = {"spread": 1} if rule == "standardized_top_k" else routing
    routing |= {"capacity_factor": 4} if encoder else {}
    told = {"experts": 4, "router": "zero", "routing": routing, "target": "upcycle_moe", **QUICK}
    told |= {"top_k": 4} if rule.endswith("top_k") else {}
    upcycle.convert(str(dense), tmp_path / "out", **told)
    head = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    expected = logits(dense, ids(), head=head)
    assert relative_error(logits(tmp_path / "out", ids(), head=head), expected) < ROUNDING


@pytest.mark.parametrize("name", ["d2d_norms", "moefication"])
def test_trained_routers_are_written_loaded_and_run_as_they_were_made(
    name: str, tmp_path: Path, pico: Callable[[str], Path]
) -> None:
    """In the folder as in the blueprint: the block chooses what the saved network says of the FFN's input."""
    from upcycle.ffn.blueprint import BlueprintFile

    dynamic = name == "d2d_norms"
    routing = {"rule": "dynamic_k", "tau": 0.6} if dynamic else {"scores": "ones", "normalized": False}
    told: dict[str, Any] = {"router": {"name": name, "parameters": {"epochs": 3}}, "routing": routing}
    told |= {} if dynamic else {"top_k": 3}
    keys = {**SPLIT, **told, "calibration": TEXT, "refit": "none", "tokenizer": "copy", "dtype": "float32"}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.all_experts_error is not None
    assert result.verification.all_experts_error < ROUNDING
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    blocks = [module for module in model.modules() if isinstance(module, MoeBlock)]
    saved = BlueprintFile(tmp_path / "out" / "blueprint.safetensors")
    shares: list[float] = []
    for layer, block in enumerate(blocks):
        x = torch.randn(50, block.router.reads, generator=torch.Generator().manual_seed(layer))
        with torch.no_grad():
            torch.testing.assert_close(block.router(x)[0], saved.layer(layer).network.logits(x))
        shares.append(float((block.rule.gates(block.router(x)[0]) > 0).float().mean()))
    assert all(0 < share < 1 for share in shares)
    assert all(0 < share < 1 for share in result.verification.neurons_run)
    # The rule's parameter is changed at load time: then it is the dense model.
    every = {"tau": 0} if dynamic else {"top_k": E}
    error = relative_error(logits(tmp_path / "out", ids(), routing=every), logits(pico("llama"), ids()))
    assert error < ROUNDING
    again = upcycle.verify(tmp_path / "out", text=None)
    assert again.neurons_run


def test_a_refit_under_dynamic_k_comes_nearer_to_the_dense_layers(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    told = {**SPLIT, "calibration": TEXT, "routing": {"rule": "dynamic_k", "tau": 0.8}, "tokenizer": "copy"}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **told)
    assert (result.plan.router, result.plan.refit) == ("d2d_norms", "down")  # by default
    for layer in result.layers:
        assert layer["error_after"] < layer["error_before"]  # of held-out tokens
        assert 0 < layer["chosen"] < 1


def test_config_and_record_say_the_rule_and_the_router(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    dense = source("gpt2", pico, tmp_path)
    upcycle.convert(str(dense), tmp_path / "out", **{**SPLIT, **ALL_ON["relu"]})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (entry,) = config["replaced_ffns"]
    assert entry["routing"] == {"rule": "relu"}
    assert entry["router_bias"] is True
    assert entry["biases"] == ["up", "output"]  # the down bias belongs to no expert: weights may sum to anything
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["routing"]["rule"] == "relu"
    assert record["plan"]["routing"]["paper"].endswith("2412.14711")


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"target": "mixtral", **ALL_ON["relu"]}, RefusalError, "mixtral routes by top-k of softmax.*positive logit"),
        ({"target": "auto", **ALL_ON["dynamic_k"]}, RefusalError, "at least 0 times the largest predicted norm"),
        (
            {"target": "mixtral", "top_k": 2, "router": "moefication", "calibration": TEXT},
            RefusalError,
            "mixtral has linear routers, and the moefication router has a hidden layer of 8",
        ),
        ({"routing": "dynamic_k", "router": "cool"}, UsageError, "dynamic_k compares predicted norms.*cool router"),
        ({"routing": "dynamic_k", "top_k": 2}, UsageError, "top_k is 2, and the rule dynamic_k finds for every token"),
        ({"routing": {"rule": "relu", "tau": 0.1}}, UsageError, "'tau' is no parameter of the rule relu: it has none"),
        ({"routing": {"rule": "dynamic_k", "tau": 2}}, UsageError, "routing.tau"),
        ({"routing": {"rule": "best"}}, UsageError, "routing.rule"),
        (
            {"routing": "threshold", "calibration": TEXT, "refit": "blocks", "router": "ridge"},
            UsageError,
            "refit blocks trains a layer behind a linear router",
        ),
        (
            {"routing": "threshold", "calibration": TEXT, "refit": "down", "scale": 3.0, "router": "ridge"},
            UsageError,
            "plain sum of the chosen experts: scale 1, not 3",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    keys: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, pico: Callable[[str], Path]
) -> None:
    with pytest.raises(error, match=message) as found:
        upcycle.convert(str(pico("llama")), tmp_path / "out", **{**SPLIT, "tokenizer": "copy", **keys})
    assert not (tmp_path / "out").exists()
    if error is RefusalError:
        assert "--target upcycle_moe" in str(getattr(found.value, "hint", ""))


def test_an_active_fraction_and_a_rule_that_counts_itself_are_refused(
    tmp_path: Path, pico: Callable[[str], Path]
) -> None:
    keys = {key: value for key, value in SPLIT.items() if key != "experts"}
    with pytest.raises(UsageError, match="'active' says how much runs, and the rule relu finds"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **keys, routing="relu", active=0.5)


def test_a_written_recipe_is_read_again(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    """recipe.yaml holds all keys, top_k among them."""
    import yaml

    first = upcycle.convert(str(pico("llama")), tmp_path / "out", **{**SPLIT, **ALL_ON["threshold"]})
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["routing"]["rule"] == "threshold"
    assert recipe["top_k"] == E
    recipe["source"] = str(pico("llama"))
    again = upcycle.convert(out=tmp_path / "again", **recipe)
    assert again.plan.routing == first.plan.routing
