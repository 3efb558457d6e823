"""What a result is compared with: the source as stock transformers reads it, unrounded, and behind every window."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.errors import VerificationError
from upcycle.files import hashing, records
from upcycle.text.reach import Reach, reach_of
from upcycle.verification import measure, verify_experts, verify_growth

Pico = Callable[[str], Path]
IDS = torch.arange(3, 67)[None] * 11


def resealed(folder: Path) -> Path:
    record = records.read_record(folder)
    record["files"] = {name: hashing.hash_file(folder / name) for name in record["files"]}
    (folder / records.FILE).write_text(json.dumps(record))
    return folder


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """This tool reads one tensor of every checkpoint wrong, wherever it asks for it."""
    right = Checkpoint._checked

    def wrong(self: Checkpoint, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        found = right(self, name, tensor, dtype)
        return found * 1.01 if name == "model.layers.1.self_attn.o_proj.weight" else found

    monkeypatch.setattr(Checkpoint, "_checked", wrong)


@pytest.mark.one_in(8)
@pytest.mark.usefixtures("misread")
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["copies", "dense growth", "moe growth", "alike mix"])
def test_a_tensor_that_upcycle_misreads_is_found(
    kind: str,
    streamed: bool,
    pico: Pico,
    pico_moe: Pico,
    branches: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The judge does not share the defendant's eyes: it would see the same wrong tensor and call the result exact."""
    if streamed:
        for module in (verify_experts, verify_growth):
            monkeypatch.setattr(module, "available_memory", lambda: 0)
    keys: dict[str, Any] = {
        "copies": {"source": str(pico("llama")), "experts": 2},
        "dense growth": {"source": str(pico("llama")), "method": "depth_stack", "parameters": {"growth": 1}},
        "moe growth": {"source": str(pico_moe("mixtral")), "method": "expert_upcycling", "experts": 8, "top_k": 4}
        | {"parameters": {"noise": 0}},
        "alike mix": {"source": None, "sources": [str(f) for f in branches(2, 0.0)], "method": "branch_train_mix"},
    }[kind]
    if kind == "alike mix":
        keys |= {"router": "random"}
    with pytest.raises(VerificationError, match="relative logit error"):
        upcycle.convert(out=tmp_path / "out", verification={"tokens": 32}, **keys)


def test_the_error_of_rounding_is_reported_by_itself(pico: Pico, tmp_path: Path) -> None:
    """Promised is the dense model in bfloat16; compared with is the one in fp32, and what rounding costs is said."""
    keys = {"experts": 2, "dtype": "bfloat16", "verification": {"tokens": 64}}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **keys).verification
    assert result is not None
    assert result.verdict == "exact"
    with torch.no_grad():
        dense: Any = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.float32)
        ids = torch.cat([IDS])
        stored = dense(ids).logits
        for weight in dense.parameters():
            weight.copy_(weight.bfloat16().float())
        own = ((dense(ids).logits - stored).norm() / stored.norm()).item()
    assert result.rounding_error is not None
    assert 0.2 * own < result.rounding_error < 5 * own  # on other tokens
    assert result.relative_logit_error == pytest.approx(result.rounding_error, rel=0.01)
    assert result.tolerance == pytest.approx(result.rounding_error + 1e-5 * (1 + result.rounding_error))
    assert "rounding the source's weights alone" in result.explanation


def test_rounding_hides_no_fault(pico: Pico, tmp_path: Path) -> None:
    keys = {"experts": 2, "dtype": "bfloat16", "verification": {"enabled": False}}
    upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors[name][0] *= 1.02  # far less than what rounding moves the logits by
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    result = upcycle.verify(resealed(tmp_path / "out"), tokens=64)
    assert result.verdict == "broken"
    assert result.rounding_error is not None
    assert result.relative_logit_error < 2 * result.rounding_error


def test_what_is_stored_in_the_dtype_that_is_written_does_not_round(pico: Pico, tmp_path: Path) -> None:
    result = upcycle.convert(str(pico("gemma-bfloat16")), tmp_path / "out", experts=2, verification={"tokens": 32})
    assert result.verification is not None
    assert result.verification.rounding_error is None


@pytest.mark.long
def test_a_window_that_is_lost_is_found(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of the text have 256 tokens, the model's has 300: nothing shows before."""
    source, out = shutil.copytree(pico("mistral"), tmp_path / "dense"), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "sliding_window": 300}))
    whole = upcycle.convert(str(source), out, experts=2, verification={"tokens": 256}).verification
    assert whole is not None
    assert (whole.verdict, whole.positions_needed, whole.positions) == ("exact", 300, 337)
    assert whole.far_error is not None
    assert whole.far_error < 1e-5
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    result = upcycle.verify(resealed(out), tokens=256)
    assert result.verdict == "broken"
    assert "behind position 300" in result.explanation
    assert result.relative_logit_error < 1e-5
    monkeypatch.setattr(measure, "MOST_WORK", 0)  # too dear: what was not compared is said
    result = upcycle.verify(out, tokens=256)
    assert (result.verdict, result.positions, result.far_error) == ("exact", 256, None)
    assert "only the first 256 positions were compared" in result.explanation
    assert "--tokens 337" in result.explanation
    assert upcycle.verify(out, tokens=512).verdict == "broken"  # who asks for more tokens gets them


ROPE = {"rope_theta": 1e4, "factor": 4.0}
LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_type": "longrope", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("llama", {}, (0, 0)),
        ("mistral", {"sliding_window": 64}, (64, 80)),
        ("mistral", {"sliding_window": 4096}, (0, 0)),  # never reached
        ("mistral", {"sliding_window": 500}, (500, 512)),  # no text is longer than the context
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, (0, 0)),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (64, 80)),
        ("cohere2", {"sliding_window": 128, "layer_types": ["full_attention"] * 3}, (0, 0)),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}, (0, 0)),
        (
            "llama",
            {"rope_parameters": {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 128}},
            (128, 144),
        ),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, (512, 576)),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}, (256, 288)),
        (
            "phi3",
            {"rope_parameters": LONG, "original_max_position_embeddings": 128, "sliding_window": 200},
            (200, 225),
        ),
    ],
)
def test_reach_is_the_length_that_passes_every_window(
    kind: str, changes: dict[str, Any], expected: tuple[int, int]
) -> None:
    from pico_models import COMMON

    reach = reach_of(AutoConfig.for_model(kind, **{**COMMON, **changes}))
    assert (reach.border, reach.length) == expected
    assert not reach.border or 0 < reach.judged <= reach.length - reach.border


def test_a_text_that_is_too_short_is_repeated() -> None:
    assert Reach(4, 7).text(torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 2, 3, 4, 1, 2, 3]]


@pytest.mark.long
def test_a_mix_is_compared_with_what_stock_reads_of_every_source(
    branches: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts of one source read wrong: with all experts on, a layer is not the sources' mean."""
    right = Checkpoint._checked

    def wrong(self: Checkpoint, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        found = right(self, name, tensor, dtype)
        return (
            found * 1.01
            if name == "model.layers.1.mlp.up_proj.weight" and "branch-1" in str(self.source.path)
            else found
        )

    sources = [str(folder) for folder in branches(2)]
    keys: dict[str, Any] = {"sources": sources, "method": "branch_train_mix", "router": "random", "top_k": 1}
    keys |= {"verification": {"tokens": 32}}
    right_one = upcycle.convert(None, tmp_path / "right", **keys).verification
    assert right_one is not None
    assert right_one.all_experts_error is not None
    assert right_one.all_experts_error < 1e-6
    monkeypatch.setattr(Checkpoint, "_checked", wrong)
    with pytest.raises(VerificationError, match="the mean of the sources' FFNs"):
        upcycle.convert(None, tmp_path / "out", **keys)
