"""The configuration of wrapped models: read, refused, written again."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config

import upcycle.models  # noqa: F401
from upcycle.errors import CheckpointError
from upcycle.ffn.router_network import RouterForm
from upcycle.models.own import configuration
from upcycle.models.own.replaced_ffn import ReplacedFfn, read_replaced
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.models.own.routing.top_k import TopKRule

ENTRY: dict[str, Any] = {
    "paths": [["h.0.mlp"]],
    "hidden_size": 32,
    "activation": "gelu_new",
    "gated": False,
    "biases": ["up", "output"],
    "experts": 4,
    "width": 16,
    "routing": {"rule": "top_k", "top_k": 2},
}
MLP = {"kind": "mlp", "width": 8, "activation": "relu"}
RAW = {"model_type": "upcycle_moe", "base_model_type": "gpt2", "n_embd": 32, "n_layer": 1, "replaced_ffns": [ENTRY]}


def test_it_is_a_configuration_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, GPT2Config)
    assert type(config).__name__ == "UpcycleMoeGPT2Config"
    assert (config.model_type, config.base_model_type, config.hidden_size) == ("upcycle_moe", "gpt2", 32)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: saved[key] for key in RAW} == RAW
    assert configuration.UpcycleMoeGPT2Config is type(config)
    with pytest.raises(AttributeError, match="UpcycleMoeNothingConfig"):
        _ = configuration.UpcycleMoeNothingConfig


def test_a_linear_router_is_not_written_and_may_be() -> None:
    """Folders of earlier versions have no such key."""
    (read,) = read_replaced([{**ENTRY, "router": {"kind": "linear"}}], "config.json")
    assert read == read_replaced([ENTRY], "config.json")[0]
    assert "router" not in read.to_json()


def test_an_entry_is_read_and_written_whole() -> None:
    (read,) = read_replaced([ENTRY], "config.json")
    assert read == ReplacedFfn(
        (("h.0.mlp",),), 32, "gelu_new", False, frozenset({"up", "output"}), (16,) * 4, 0, False, TopKRule(2)
    )
    for ffn in (
        read,
        ReplacedFfn((("a", "b"),), 8, "relu", True, frozenset(), (3, 5), 2, True, ThresholdRule(0.1), 0.5),
        replace(read, router=RouterForm(12, "tanh", unit_inputs=True)),
        replace(read, router=RouterForm(3, "relu", absolute=True)),
    ):
        assert read_replaced([json.loads(json.dumps(ffn.to_json()))], "config.json") == [ffn]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, r"'replaced_ffns\[0\].hidden_size' must be a positive integer, got 0"),
        ({"hidden_size": None}, "hidden_size' must be a positive integer, got None"),
        ({"activation": "gellu"}, "activation' must be an activation of transformers, got 'gellu'"),
        ({"gated": 1}, "gated' must be true or false, got 1"),
        ({"biases": ["gate"]}, "biases' names gate, and 'gated' is false"),
        ({"biases": ["side"]}, "biases' must be a list of gate, up, down, output"),
        ({"widths": [16, 16]}, "widths' and 'experts' are both there"),
        ({"width": -1}, "width' must be a positive integer, got -1"),
        ({"shared_width": 2.5}, "shared_width' must be an integer that is not negative"),
        ({"routing": {"rule": "best"}}, "routing.rule' is 'best'; rules: top_k, tempered, dynamic_k, threshold, relu"),
        ({"routing": {"rule": "top_k", "top_k": 5}}, "routing' is wrong: 'top_k' is 5, and there are 4 experts"),
        ({"routing": {"rule": "relu", "tau": 1}}, "'tau' is no parameter of the rule relu"),
        ({"routing": "top_k"}, "routing' must be a mapping, got 'top_k'"),
        ({"paths": ["h.0.mlp"]}, "paths' must be a list of lists of module paths"),
        ({"paths": [["h.0.mlp"], ["h.0.mlp"]]}, "names the module 'h.0.mlp' twice"),
        ({"router": "mlp"}, "router' must be a mapping, got 'mlp'"),
        ({"router": {"kind": "deep"}}, "router.kind' must be linear or mlp, got 'deep'"),
        (
            {"router": {"kind": "linear", "width": 3}},
            "router.width' is there, and a linear router has nothing but a kind",
        ),
        (
            {"router": {"kind": "mlp", "width": 0, "activation": "relu"}},
            "router.width' must be a positive integer, got 0",
        ),
        ({"router": {"kind": "mlp", "width": 8}}, "router.activation' must be tanh or relu, got None"),
        ({"router": {"kind": "mlp", "width": 8, "activation": "gelu"}}, "activation' must be tanh or relu, got 'gelu'"),
        ({"router": {**MLP, "absolute": 1}}, "router.absolute' must be true or false, got 1"),
        ({"router": {**MLP, "depth": 3}}, "router.depth' is unknown; known: kind, width"),
        ({"dropout": 2}, "dropout' must be a number from 0 to 1, got 2"),
        ({"width_of": 1}, "width_of' is unknown; known: paths"),
    ],
)
def test_wrong_entries_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        configuration.UpcycleMoeConfig.from_dict({**RAW, "replaced_ffns": [{**ENTRY, **changes}]})


@pytest.mark.parametrize("key", ["hidden_size", "activation", "gated", "width", "experts", "routing", "paths"])
def test_missing_keys_are_named(key: str) -> None:
    entry = {name: value for name, value in ENTRY.items() if name != key}
    with pytest.raises(CheckpointError, match=f"{key}' is missing"):
        read_replaced([entry], "config.json")


@pytest.mark.parametrize("base", [None, "gpt9", "upcycle_moe", 7, ["gpt2"]])
def test_an_unknown_base_is_named(base: Any) -> None:
    with pytest.raises(CheckpointError, match=r"'base_model_type' is .*, and transformers has no such model"):
        configuration.UpcycleMoeConfig.from_dict({**RAW, "base_model_type": base})


def test_it_needs_a_base() -> None:
    with pytest.raises(CheckpointError, match="is one of its base model"):
        AutoConfig.for_model("upcycle_moe")
    with pytest.raises(CheckpointError, match="'replaced_ffns' must be a list, got 'all'"):
        configuration.UpcycleMoeConfig.from_dict({**RAW, "replaced_ffns": "all"})


@pytest.mark.long
def test_another_process_reads_a_pickled_configuration(tmp_path: Path) -> None:
    import pickle

    config = configuration.UpcycleMoeConfig.from_dict(RAW)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    code = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "config.pkl")], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "UpcycleMoeGPT2Config"
