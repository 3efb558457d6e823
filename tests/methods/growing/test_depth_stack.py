"""Depth stacking against the stock model with its layers repeated by hand, in every family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import COMMON, PICO
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.architectures.module_paths import module_paths_of
from upcycle.errors import RefusalError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.methods.growing.base import stacked_config
from upcycle.registry import load

Pico = Callable[[str], Path]
UNCHECKED: dict[str, Any] = {"tokenizer": "none", "verification": {"enabled": False}}
QUICK: dict[str, Any] = {"tokenizer": "none", "verification": {"tokens": 64}}


def stacked_by_hand(folder: Path, growth: int) -> Any:
    """The stock model, its layers (and the kinds of its layers) repeated; the order is the paper's, i mod L."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body, _, name = module_paths_of(model.config).layers.rpartition(".")
    layers = getattr(model.get_submodule(body), name)
    order = [i % len(layers) for i in range(growth * len(layers))]
    setattr(model.get_submodule(body), name, ModuleList(copy.deepcopy(layers[i]) for i in order))
    model.config.num_hidden_layers = len(order)
    for key in ("layer_types", "layer_rope_theta"):
        if listed := getattr(model.config, key, None):
            setattr(model.config, key, [listed[i] for i in order])
    return model


@pytest.mark.one_in(19)
@pytest.mark.parametrize("name", PICO)
def test_the_result_computes_what_the_repeated_layers_compute(name: str, pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico(name)), tmp_path / "out", method="depth_stack", parameters={"growth": 3}, **UNCHECKED)
    ids = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = stacked_by_hand(pico(name), 3)(ids, use_cache=False).logits
        result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(result(ids, use_cache=False).logits, expected)


# Rules over layer numbers, as checkpoints on the hub have them, that a repeated stack breaks.
RULES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),  # no layer has one
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "head_dim": 16}),
    ("cohere2", {"sliding_window": 16, "sliding_window_pattern": 2}),
    ("cohere2", {"sliding_window": 16}),
    ("lfm2", {"full_attn_idxs": [1]}),
    ("lfm2", {"full_attn_idxs": []}),
    ("qwen3_5_text", {"full_attention_interval": 2, "head_dim": 16}),
]


@pytest.mark.parametrize(("model_type", "rule"), RULES)
def test_kinds_of_layers_are_repeated_with_them(model_type: str, rule: dict[str, Any]) -> None:
    raw = {**COMMON, **rule, "model_type": model_type}
    family = load("family", model_type)()
    config = stacked_config(raw, family, family.config(raw), [0, 1, 2, 0, 1, 2])
    before, after = AutoConfig.for_model(**raw), AutoConfig.for_model(**json.loads(json.dumps(config)))
    assert after.num_hidden_layers == 6
    assert after.layer_types == 2 * before.layer_types
    assert getattr(after, "sliding_window", None) == getattr(before, "sliding_window", None)


def test_other_lists_per_layer_grow_and_code_is_not_referenced() -> None:
    family = load("family", "llama")()
    raw = {**COMMON, "model_type": "llama", "no_rope_layers": [1, 1, 1], "auto_map": {"AutoModel": "evil.X"}}
    config = stacked_config(raw, family, family.config(raw), [0, 1, 2, 0, 1, 2])
    assert config["no_rope_layers"] == [1] * 6
    assert "auto_map" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert raw["num_hidden_layers"] == 3  # the source's own is left alone


def test_one_stack_is_the_same_model(pico: Pico, tmp_path: Path) -> None:
    keys = {"method": "depth_stack", "parameters": {"growth": 1}}
    result = upcycle.convert(str(pico("gemma-bfloat16")), tmp_path / "out", **keys, **QUICK)
    assert result.verification is not None
    assert (result.verification.verdict, result.verification.relative_logit_error) == ("exact", 0.0)
    assert (result.plan.parameters_total, result.plan.flops_per_token) == (
        result.plan.parameters_dense,
        result.plan.flops_per_token_dense,
    )


def test_numbers_of_the_plan(pico: Pico, tmp_path: Path) -> None:
    plan = upcycle.plan(str(pico("qwen2")), method="depth_stack")  # the paper's factor: 4; the head is tied
    outside = 4096 * 32 + 32
    layers = plan.parameters_dense - outside
    assert plan.parameters_total == plan.parameters_active == 4 * layers + outside
    assert plan.flops_per_token == 2 * plan.parameters_total
    assert "12 layers from 3" in plan.summary


def test_a_dtype_is_written_and_named(pico: Pico, tmp_path: Path) -> None:
    keys = {"method": "depth_stack", "dtype": "bfloat16", "parameters": {"growth": 2}}
    upcycle.convert(str(pico("llama")), tmp_path / "out", **keys, **QUICK)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {spec.dtype for spec in SafetensorsFolder(tmp_path / "out").specs.values()} == {"bfloat16"}


def test_the_stack_is_a_source_like_any_other(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(
        str(pico("qwen2-windows")), tmp_path / "deep", method="depth_stack", parameters={"growth": 2}, **UNCHECKED
    )
    result = upcycle.convert(str(tmp_path / "deep"), tmp_path / "moe", experts=4, **QUICK)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert len(result.verification.layer_errors) == 6


def test_a_single_layer_is_warned_of(tmp_path: Path) -> None:
    raw = {**COMMON, "model_type": "llama", "num_hidden_layers": 1}
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{key: value for key, value in raw.items() if key != "model_type"})).save_pretrained(
        tmp_path / "one"
    )
    plan = upcycle.plan(str(tmp_path / "one"), method="depth_stack", tokenizer="none")
    assert "copies of a single layer do not learn" in plan.warnings[0]
    again = upcycle.plan(str(tmp_path / "one"), method="depth_stack", tokenizer="none", parameters={"growth": 1})
    assert again.warnings == []


def test_a_moe_is_refused_with_what_grows_it(pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    for keys in ({"method": "depth_stack"}, {"method": "sparse_upcycling"}):
        with pytest.raises(RefusalError, match="is a Mixture-of-Experts already") as caught:
            upcycle.convert(str(pico_moe("qwen3_moe")), tmp_path / "out", **keys)
        assert "--method expert_upcycling" in (caught.value.hint or "")
