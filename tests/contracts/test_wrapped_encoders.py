"""Encoders that are wrapped: what is theirs alone. What holds for every described model is in ``test_wrapped_parts.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from wrapped_models import inputs_of, relative_error, small_model

import upcycle
import upcycle.models
from upcycle.errors import EnvironmentFault, UsageError, VerificationError
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.moe_shape import Part
from upcycle.publishing.model_card import make_card
from upcycle.report.write_report import write_report
from upcycle.verification import verify_experts

pytestmark = pytest.mark.one_in(6)  # the other cases are long

QUICK = {"tokenizer": "none", "verification": {"tokens": 64}}
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, **QUICK}
ROUNDING = 2e-6


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit", "embedding_gemma"])
def test_encoders_without_a_head_are_converted_and_streamed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    config = small_model(name).config
    config.architectures = None
    torch.manual_seed(0)
    dense = AutoModel.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES).verification
    assert result is not None
    assert result.streamed
    assert result.verdict == "exact"
    model, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    inputs = inputs_of(name)
    with torch.no_grad():
        assert relative_error(model(**inputs).last_hidden_state, dense(**inputs).last_hidden_state) < ROUNDING


def test_positions_that_old_files_hold_are_left_out(tmp_path: Path) -> None:
    """A real file of all-MiniLM-L6-v2 has them, as int64, and is not quantized for that."""
    small_model("bert").save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    held = next(name for name in tensors if name.endswith("embeddings.word_embeddings.weight"))
    tensors[held.replace("word_embeddings.weight", "position_ids")] = torch.arange(64)[None]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES).verification
    assert result is not None
    assert result.verdict == "exact"
    assert not any("position_ids" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_an_image_model_needs_no_tokenizer(tmp_path: Path) -> None:
    small_model("vit").save_pretrained(tmp_path / "dense")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "dense" / "preprocessor_config.json").write_text(json.dumps(settings))
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", method="sparse_upcycling", experts=2)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"] == settings["size"]
    assert result.verification is not None
    assert (result.verification.text, result.verification.tokens) == ("random images", 16)


def test_a_wrong_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ExpertTensors.part

    def wrong(self: ExpertTensors, part: Part) -> torch.Tensor:
        made = right(self, part)
        return -made if (part.kind, part.expert) == ("down_rows", 1) else made

    monkeypatch.setattr(ExpertTensors, "part", wrong)
    small_model("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(VerificationError, match="relative error of the hidden states"):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES)


def test_what_encoders_cannot_do_is_refused(tmp_path: Path) -> None:
    small_model("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(EnvironmentFault, match="holds no vocabulary"):
        upcycle.evaluate(str(tmp_path / "dense"))
    keys = {"method": "random_split", "experts": 8, "top_k": 4, "calibration": {"text": "prose", "tokens": 2048}}
    with pytest.raises(UsageError, match="leaves no tokenizer"):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **keys, **QUICK)


@pytest.mark.parametrize(
    ("name", "model", "reader", "task"),
    [
        ("bert", "AutoModelForMaskedLM", "AutoTokenizer", "fill-mask"),
        ("vit", "AutoModelForImageClassification", "AutoImageProcessor", "image-classification"),
    ],
)
def test_card_and_report_of_an_encoder_say_how_it_is_loaded(
    name: str, model: str, reader: str, task: str, tmp_path: Path
) -> None:
    small_model(name).save_pretrained(tmp_path / "dense")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES)
    card = make_card(tmp_path / "out", "out")
    assert f"from transformers import {model}, {reader}\n\nimport upcycle.models" in card
    assert f"pipeline_tag: {task}" in card
    assert "library_name: upcycle" in card
    assert "needs no code of its own" not in card
    assert "vllm serve" not in card
    write_report(tmp_path / "out")
    assert "relative error of the hidden states" in (tmp_path / "out" / "report.html").read_text()
