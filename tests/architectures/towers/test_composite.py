"""Models of parts: other names on disk, what stock classes leave out, resuming, image checks that fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_towers import PARTS, changed, make_tower, reconfigured
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

import upcycle
from upcycle.architectures.towers.wrappers import llava
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.checkpoints.shard_writer import ShardWriter
from upcycle.errors import UsageError
from upcycle.files import hashing, records
from upcycle.inference.generate import Writer
from upcycle.progress import Progress

COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "tokenizer": "none"}
CHECKED: dict[str, Any] = {**COPIES, "verification": {"tokens": 64}}
UNCHECKED: dict[str, Any] = {**COPIES, "verification": {"enabled": False}}


class Notes(Progress):
    """Keeps what a user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("wrapper", "text"), [("llava", "llama"), ("mistral3", "gemma")])
def test_names_of_the_stock_class_on_disk_are_kept(
    wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    """As some releases are stored; Gemma's head was tied and is written now."""
    source = tmp_path / "source"
    shutil.copytree(tower(wrapper, text), source)
    AutoModelForMultimodalLM.from_pretrained(source).save_pretrained(source, save_original_format=False)
    assert all(name.startswith(("model.", "lm_head.")) for name in load_file(source / "model.safetensors"))
    result = upcycle.convert(str(source), tmp_path / "out", **CHECKED).verification
    assert result is not None
    assert result.verdict == "exact"
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert all(name.startswith(("model.", "lm_head.")) for name in names)
    assert "lm_head.weight" in names


def test_a_head_that_was_tied_gets_the_prefix_of_the_others(tower: Callable[..., Path], tmp_path: Path) -> None:
    source = tower("mistral3", "gemma", tie_word_embeddings=True)
    assert "language_model.lm_head.weight" not in load_file(source / "model.safetensors")
    result = upcycle.convert(str(source), tmp_path / "out", **CHECKED).verification
    assert result is not None
    assert result.verdict == "exact"
    assert "language_model.lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(("wrapper", "text"), [("llava", "llama"), ("smolvlm", "llama"), ("qwen3_vl", "qwen3-vl")])
def test_tied_heads_stay_tied(wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(tower(wrapper, text, tie_word_embeddings=True)), tmp_path / "out", **CHECKED)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert not any("lm_head" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_stored_head_counts_even_if_config_says_tied(tower: Callable[..., Path], tmp_path: Path) -> None:
    source = reconfigured(
        tower("llava", "llama"),
        tmp_path / "source",
        tie_word_embeddings=True,
        text_config={"tie_word_embeddings": True},
    )
    result = upcycle.convert(str(source), tmp_path / "out", **CHECKED).verification
    assert result is not None
    assert result.verdict == "exact"
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"]) == (False, False)


def test_what_the_stock_class_does_not_load_is_left_out_with_a_note(tower: Callable[..., Path], tmp_path: Path) -> None:
    """Qwen3.5's releases have layers for multi-token prediction, which its class ignores."""
    extra = {"mtp.norm.weight": torch.ones(32), "mtp.fc.weight": torch.ones(32, 64)}
    source = changed(tower("qwen3_5", "qwen3.5-vl"), tmp_path / "source", lambda t: t.update(extra))
    for dtype in ("keep", "bfloat16"):
        result = upcycle.convert(str(source), tmp_path / dtype, dtype=dtype, **CHECKED)
        assert any("'mtp.fc.weight' and 1 more" in warning for warning in result.plan.warnings)
        assert result.verification is not None
        assert result.verification.verdict == "exact"
        assert not any(name.startswith("mtp.") for name in load_file(tmp_path / dtype / "model.safetensors"))


def test_a_wrong_part_is_found_with_the_image_alone(tower: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    upcycle.convert(str(tower("llava", "llama")), out, **UNCHECKED)
    tensors = load_file(out / "model.safetensors")
    tensors["multi_modal_projector.linear_2.weight"] *= 1.001
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    record = records.read_record(out)
    record["files"]["model.safetensors"] = hashing.hash_file(out / "model.safetensors")
    (out / records.FILE).write_text(json.dumps(record))
    result = upcycle.verify(out, tokens=64)
    assert result.verdict == "broken"
    assert result.relative_logit_error < 1e-6
    assert result.media_error is not None
    assert result.media_error > 1e-5
    assert (
        result.explanation.startswith("relative logit error") and "with what its other parts read" in result.explanation
    )


def test_an_image_that_cannot_be_made_is_said(
    tower: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Any, rng: torch.Generator) -> dict[str, torch.Tensor]:
        raise ValueError("no such size")

    monkeypatch.setattr("upcycle.architectures.towers.wrappers.llava", type(llava)(**{**vars(llava), "sample": broken}))
    notes = Notes()
    result = upcycle.convert(str(tower("llava", "llama")), tmp_path / "out", progress=notes, **CHECKED).verification
    assert result is not None
    assert (result.verdict, result.media_error) == ("exact", None)
    said = "images were not compared: by its configuration: no such size"
    assert result.media == said
    assert said in result.explanation
    assert said in notes.notes


def test_a_stopped_conversion_continues_byte_by_byte(
    tower: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keys = str(tower("llava", "qwen2")), {**UNCHECKED, "max_shard_size": "200KB"}
    upcycle.convert(source, tmp_path / "whole", **keys)
    finish, done = ShardWriter.finish, []

    def stops(writer: ShardWriter, unit: Any) -> None:
        finish(writer, unit)
        done.append(unit.name)
        if unit.name == "layer 1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", stops)
        with pytest.raises(KeyboardInterrupt):
            upcycle.convert(source, tmp_path / "stopped", **keys)
    assert done[-1] == "layer 1"
    assert upcycle.convert(source, tmp_path / "stopped", **keys).resumed
    files = [path.name for path in sorted((tmp_path / "whole").glob("*.safetensors"))]
    assert len(files) > 2
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_several_models_of_parts_are_mixed_and_must_have_the_same_parts(
    tower: Callable[..., Path], tmp_path: Path
) -> None:
    first = tower("llava", "llama")
    ffn = "language_model.model.layers.0.mlp.up_proj.weight"
    second = changed(first, tmp_path / "second", lambda t: t.update({ffn: t[ffn] + 0.1}))
    keys: dict[str, Any] = {
        "method": "branch_train_mix",
        "experts": 2,
        "tokenizer": "none",
        "verification": {"tokens": 64},
    }
    result = upcycle.convert(None, tmp_path / "out", sources=[str(first), str(second)], **keys).verification
    assert result is not None
    assert result.verdict == "approximate"
    vision = {**PARTS["llava"]["vision_config"], "layer_norm_eps": 1e-3}
    raw = json.loads((first / "config.json").read_text())
    third = reconfigured(second, tmp_path / "third", vision_config=raw["vision_config"] | vision)
    with pytest.raises(UsageError, match=r"sources differ: config\.json's 'vision_config'"):
        upcycle.convert(None, tmp_path / "out2", sources=[str(first), str(third)], **keys)


def test_a_pruned_text_model_leaves_the_parts_as_they_are(tower: Callable[..., Path], tmp_path: Path) -> None:
    calibration = {"text": "demo", "tokens": 512, "window": 64}
    source = tower("llava", "llama")
    keys: dict[str, Any] = {"method": "static_prune", "width": 64, "calibration": calibration}
    result = upcycle.convert(str(source), tmp_path / "out", verification={"tokens": 64}, **keys)
    assert result.verification is not None
    assert result.verification.media_error is not None
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("language_model."))
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").config.text_config.intermediate_size == 64


def test_the_config_keeps_everything_but_the_text_model(tower: Callable[..., Path], tmp_path: Path) -> None:
    source = reconfigured(
        tower("llava", "llama"), tmp_path / "source", my_note={"kept": 1}, auto_map={"AutoModel": "evil.X"}
    )
    upcycle.convert(str(source), tmp_path / "out", **UNCHECKED)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    changed_keys = {"text_config", "dtype", "transformers_version", "auto_map"}
    assert {k: v for k, v in before.items() if k not in changed_keys} == {
        k: v for k, v in after.items() if k not in changed_keys
    }
    assert "auto_map" not in after
    assert (after["text_config"]["model_type"], after["text_config"]["num_local_experts"]) == ("mixtral", 4)


def test_a_text_model_without_a_type_is_the_one_that_the_wrapper_builds(tmp_path: Path) -> None:
    make_tower(tmp_path / "source", "internvl", "qwen2")
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    for key in ("model_type", "rms_norm_eps"):
        del raw["text_config"][key]
    (tmp_path / "source" / "config.json").write_text(json.dumps(raw))
    checkpoint = DenseCheckpoint.open(str(tmp_path / "source"))
    stock = AutoModelForMultimodalLM.from_pretrained(tmp_path / "source").config.text_config
    assert checkpoint.config.rms_norm_eps == stock.rms_norm_eps
    assert "Qwen2" in checkpoint.family.title
    result = upcycle.convert(str(tmp_path / "source"), tmp_path / "out", **CHECKED).verification
    assert result is not None
    assert result.verdict == "exact"


def test_qwen2_5_vl_is_read_as_it_was_released(tower: Callable[..., Path], tmp_path: Path) -> None:
    """Its files have the text model's keys outside text_config, a rotary embedding called mrope, and older names of tensors."""
    source = tmp_path / "source"
    shutil.copytree(tower("qwen2_5_vl", "qwen2.5-vl"), source)
    raw = json.loads((source / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in text.items() if key not in ("model_type", "architectures", "dtype")}
    released = {
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "rope_theta": rope["rope_theta"],
    }
    raw["vision_config"]["model_type"] = "qwen2_5_vl"
    (source / "config.json").write_text(json.dumps(raw | flat | released))
    names = load_file(source / "model.safetensors")
    assert "visual.merger.mlp.0.weight" in names and "model.embed_tokens.weight" in names
    result = upcycle.convert(str(source), tmp_path / "out", **CHECKED)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.media_error is not None
    assert any("but not videos" in warning for warning in result.plan.warnings)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["model_type"] == "glm46v"
    assert (after["image_start_token_id"], after["vision_config"]["model_type"]) == (4092, "qwen2_5_vl_vision")
    assert not {"hidden_size", "rope_scaling", "rope_theta", "vision_start_token_id"} & set(after)


@pytest.mark.long
def test_text_is_written_and_evaluated(tower: Callable[..., Path], tmp_path: Path) -> None:
    for wrapper, text in (("llava", "llama"), ("qwen3_vl", "qwen3-vl")):
        source, out = tower(wrapper, text), tmp_path / wrapper
        upcycle.convert(str(source), out, **{**UNCHECKED, "tokenizer": "copy"})
        writer = Writer(str(out))
        tokens = list(writer.write(writer.encode("Once upon a time"), 4))
        assert (writer.experts, writer.context, len(tokens[-1].experts)) == (4, 512, 2)
        ids = torch.tensor([[token.id for token in tokens if token.prompt]])
        model = AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32)
        written = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert [token.id for token in tokens] == written[0].tolist()
        evaluated = upcycle.evaluate(out, reference=source, tokens=64)
        for each in evaluated.texts:
            assert each.perplexity == pytest.approx(each.reference_perplexity, rel=1e-5)
        assert len(evaluated.layers) == 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
