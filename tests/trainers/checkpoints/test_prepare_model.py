"""What a run reads of a model folder before it trains, and what a checkpoint keeps of that folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from upcycle.errors import CheckpointError, UsageError
from upcycle.models.experts import use_experts
from upcycle.models.load import load_model
from upcycle.trainers.checkpoints.prepare_model import (
    check_parent,
    check_parent_tokens,
    collect_small_files,
    parent_folder,
    save_config,
    stored_form,
    tokenizer_of,
)
from upcycle.trainers.checkpoints.write import CONVERSION

Model = Callable[..., Path]


def test_the_stored_form_is_that_of_the_files(pico_moe: Model, pico: Model) -> None:
    assert stored_form(pico_moe("mixtral")) == {"dtype": "float32", "others": {}, "layout": "per-expert"}
    assert stored_form(pico_moe("mixtral", fused=True))["layout"] == "fused"
    assert stored_form(pico("gemma-bfloat16"))["dtype"] == "bfloat16"


def test_a_model_is_loaded_to_train(pico_moe: Model) -> None:
    model = load_model(pico_moe("qwen3_moe"), experts="auto", training=True)
    assert model.training
    assert model.config.use_cache is False
    assert model.config._experts_implementation == "upcycle"
    assert load_model(pico_moe("qwen3_moe"), experts="eager", training=True).config._experts_implementation == "eager"


@pytest.mark.parametrize(
    ("obstacle", "hidden", "wanted"),
    [(None, 32, "upcycle"), ("it is sm_75", 32, "grouped_mm"), ("it is sm_75", 30, "eager")],
)
def test_auto_experts_on_a_gpu_are_kernels_or_a_grouped_product(
    obstacle: str | None, hidden: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels, else a grouped product where rows are aligned."""
    from transformers import MixtralConfig, MixtralForCausalLM

    monkeypatch.setattr("upcycle.kernels.layout.devices.why_not", lambda device: obstacle)
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    use_experts(model, "auto")
    assert model.config._experts_implementation == wanted


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, pico_moe: Model) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(tmp_path, training=True)
    with pytest.raises(UsageError, match="transformers has no 'quickest'"):
        load_model(pico_moe("mixtral"), experts="quickest", training=True)


def test_the_parent_is_what_was_converted(tmp_path: Path, pico: Model) -> None:
    record = {"source": {"name": str(pico("llama")), "revision": None}}
    (tmp_path / "upcycle.json").write_text(json.dumps(record))
    assert parent_folder("auto", tmp_path) == pico("llama")
    collect_small_files(_with_weights(tmp_path, pico("llama")), tmp_path / "small")
    assert (tmp_path / "small" / CONVERSION / "upcycle.json").is_file()
    assert parent_folder("auto", tmp_path / "small") == pico("llama")
    assert parent_folder(str(pico("qwen2")), tmp_path) == pico("qwen2")
    (tmp_path / "upcycle.json").write_text(json.dumps({"source": {"name": "/gone", "revision": None}}))
    with pytest.raises(UsageError, match=r"distillation\.parent: no such file or folder: /gone"):
        parent_folder("auto", tmp_path)


def _with_weights(folder: Path, model: Path) -> Path:
    (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    return folder


def test_the_configuration_is_written_whole(pico_moe: Model, tmp_path: Path) -> None:
    model = load_model(pico_moe("glm4_moe"), training=True)
    save_config(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert written["use_cache"] is True
    before = json.loads((pico_moe("glm4_moe") / "config.json").read_text())
    assert {key: value for key, value in before.items() if written.get(key) != value and key != "dtype"} == {}


def test_a_parent_whose_ids_mean_other_tokens(pico: Model) -> None:
    tokenizer = tokenizer_of(pico("llama"))
    check_parent_tokens(tokenizer, tokenizer, pico("llama"))
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<more>"])
    check_parent_tokens(more, tokenizer, pico("llama"))  # what the student has not, it never reads
    with pytest.raises(UsageError, match=r"other ids for 1 of the student's .*'<more>' is \d+ and there unknown"):
        check_parent_tokens(tokenizer, more, pico("llama"))

    class Exchanged:
        def get_vocab(self) -> dict[str, int]:
            first, second, *_ = vocabulary = dict(tokenizer.get_vocab())
            return {**vocabulary, first: vocabulary[second], second: vocabulary[first]}

    with pytest.raises(UsageError, match="other ids for 2 of the student's"):
        check_parent_tokens(Exchanged(), tokenizer, pico("llama"))


def test_a_parent_that_reads_less_than_a_row(pico: Model) -> None:
    model = load_model(pico("llama"), training=True)
    context = model.config.max_position_embeddings
    check_parent(model, model, pico("llama"), context)
    with pytest.raises(UsageError, match=f"reads {context} tokens at a time, and a row has {context + 1}"):
        check_parent(model, model, pico("llama"), context + 1)
