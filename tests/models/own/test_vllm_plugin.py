"""vLLM's plug-in: what it registers, what it says that vLLM cannot run, and (with ``VLLM_PYTHON``) what vLLM writes."""

from __future__ import annotations

import configparser
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from wrapped_models import small_model, wrapped

import upcycle
from upcycle.models.own import vllm_plugin
from upcycle.verification.engines import vllm_engine
from upcycle.verification.engines.engine import WORKERS, Request
from upcycle.verification.engines.verify_with import verify_with
from upcycle.verification.engines.vllm_engine import Vllm

ROOT = Path(__file__).parents[3]
LARGER = {
    "hidden_size": 128,
    "intermediate_size": 256,
}  # heads of 32 numbers: vLLM's attention on CPUs has no smaller ones


class Backend:
    """In the place of vLLM's class."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self.built = (vllm_config, prefix)


class Registry:
    """In the place of vLLM's registry."""

    models: dict[str, str] = {}

    @classmethod
    def get_supported_archs(cls) -> list[str]:
        return [*cls.models]

    @classmethod
    def register_model(cls, name: str, where: str) -> None:
        assert name not in cls.models
        cls.models[name] = where


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the names of vLLM 0.32 that the plug-in reads."""
    for name, content in (
        ("vllm", {"ModelRegistry": Registry}),
        ("vllm.model_executor", {}),
        ("vllm.model_executor.models", {}),
        ("vllm.model_executor.models.transformers", {"TransformersForCausalLM": Backend}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Registry, "models", {"LlamaForCausalLM": "theirs"})


def test_the_entry_point_is_there() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    name, _, where = settings["options.entry_points"]["vllm.general_plugins"].strip().partition(" = ")
    module, _, function = where.partition(":")
    assert name == "upcycle"
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register


def test_every_causal_model_is_registered_and_twice_is_once(vllm: None) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    for stock in ("GPT2LMHeadModel", "PhiForCausalLM", "Gemma2ForCausalLM", "LlamaForCausalLM"):
        module, _, name = Registry.models[f"UpcycleMoe{stock}"].partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), Backend)
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        vllm_plugin.Other  # noqa: B018


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("phi", None),
        ("gemma2", None),
        ("falcon", "a falcon model cannot take vLLM's attention"),
        ("gptj", "a gptj model cannot take vLLM's attention"),
        ("gpt2", "a gpt2 model reads the output of attention by other axes"),
    ],
)
def test_what_vllm_cannot_run_is_said_before_it_tries(name: str, why: str | None, vllm: None) -> None:
    vllm_plugin._model_class.cache_clear()
    kind: Any = vllm_plugin.WrappedCausalModel
    config = wrapped(small_model(name), pieces=4).config
    given = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    if why is None:
        assert kind(vllm_config=given, prefix="x").built == (given, "x")
        return
    with pytest.raises(ValueError, match=why):
        kind(vllm_config=given)


def test_an_engine_without_the_plug_in_is_told_from_one_without_vllm(
    vllm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[dict[str, Any], str]] = []

    def worker(engine: Any, script: str, question: dict[str, Any], work: Path, python: str, hint: str, **_: str) -> Any:
        asked.append((question, hint))
        return {"version": "0", "dtype": "float32", "written": []}

    monkeypatch.setattr(vllm_engine, "run_worker", worker)
    for model_type in ("upcycle_moe", "mixtral"):
        Vllm().ask(tmp_path, {"model_type": model_type}, Request([[1]], 1, []), tmp_path, "python")
    (own, own_hint), (stock, stock_hint) = asked
    assert own["plug_in"] == "upcycle"
    assert "pip install --no-deps upcycle" in own_hint
    assert "plug_in" not in stock
    assert "--no-deps" not in stock_hint
    monkeypatch.syspath_prepend(str(WORKERS))
    script = importlib.import_module("vllm_worker")
    monkeypatch.setattr(script, "entry_points", lambda group: SimpleNamespace(names={"another"}))
    with pytest.raises(ImportError, match="plug-in 'upcycle' is not beside it"):
        script.answer(own)


@pytest.mark.slow
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python with vLLM and upcycle")
@pytest.mark.parametrize("name", ["phi", "gemma2", "falcon"])
def test_vllm_writes_what_transformers_writes(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"hidden_size": 128, "ffn_hidden_size": 256} if name == "falcon" else LARGER
    changes = changes | ({"head_dim": 32} if name == "gemma2" else {})
    small_model(name, vocab_size=4096, **changes).save_pretrained(tmp_path / "dense")
    keys = {"method": "random_split", "experts": 4, "top_k": 2, "tokenizer": "none", "verification": {"tokens": 64}}
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "moe", **keys)
    found = verify_with(tmp_path / "moe", "vllm", python=os.environ["VLLM_PYTHON"])
    assert found.verdict == ("not held" if name == "falcon" else "same"), found.explanation


def test_experts_of_low_rank_are_refused() -> None:
    from upcycle.models.own.configuration import wrapped_config

    config = wrapped_config(small_model("gemma2").config, [])
    assert vllm_plugin.what_prevents(config) is None
    config.adapted_ffns = [{"paths": [["layers.0.mlp"]]}]
    assert "experts of low rank" in str(vllm_plugin.what_prevents(config))
