"""What every registered family promises: its defaults are the stock class's, and its read-out agrees with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from upcycle.checkpoint import DenseCheckpoint, family_of
from upcycle.registry import FAMILIES, load


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_stock_class(name: str) -> None:
    stock, family = AutoConfig.for_model(name), load("family", name)()
    read = family.config({"model_type": name})
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range",
                "attention_dropout", "tie_word_embeddings"):  # fmt: skip
        assert getattr(read, key) == getattr(stock, key), key
    assert read.head_dim == getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    assert dict(read.rope_parameters) == stock.rope_parameters
    assert {key: getattr(stock, key) for key in read.token_ids} == dict(read.token_ids)


RAW: list[dict[str, Any]] = [
    {"rope_theta": 1e6},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
]


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("name", FAMILIES)
def test_rope_is_read_as_the_stock_class_reads_it(name: str, raw: dict[str, Any]) -> None:
    stock = AutoConfig.for_model(name, **json.loads(json.dumps(raw)))
    read = load("family", name)().config({"model_type": name, **raw})
    # The stock class keeps the old spelling of rope_type beside the new one.
    assert dict(read.rope_parameters) == {key: value for key, value in stock.rope_parameters.items() if key != "type"}


@pytest.mark.parametrize(
    "name", ["llama", "llama-rope", "mistral", "mistral-window", "qwen2", "qwen2-windows", "qwen3", "qwen3-bias"]
)
def test_a_stock_checkpoint_is_accepted_whole(name: str, pico: Callable[[str], Path]) -> None:
    checkpoint = DenseCheckpoint.open(str(pico(name)))
    stock = AutoConfig.from_pretrained(pico(name))
    assert checkpoint.family.name == stock.model_type
    kinds = getattr(stock, "layer_types", None)
    windows = [
        getattr(stock, "sliding_window", None) if kinds is None or kind == "sliding_attention" else None
        for kind in kinds or [None] * stock.num_hidden_layers
    ]
    assert list(checkpoint.config.windows) == windows


def test_every_listed_target_exists() -> None:
    for name in FAMILIES:
        for target in load("family", name).targets:
            assert load("target", target).name == target


def test_family_is_chosen_by_model_type() -> None:
    assert family_of({"model_type": "qwen2"}, "here").name == "qwen2"
