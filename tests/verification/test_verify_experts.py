"""The verdict: its numbers against a plain recomputation, and every way a model can be broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import CheckpointError, UsageError
from upcycle.files import hashing, records
from upcycle.files.locate import DEMO_FOLDER
from upcycle.text.windows import encode
from upcycle.verification import verify_experts

Pico = Callable[[str], Path]


@pytest.fixture
def sparse(pico: Pico, tmp_path: Path) -> Path:
    keys = {"method": "random_split", "top_k": 4, "verification": {"enabled": False}}
    upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)
    return tmp_path / "out"


def reseal(folder: Path) -> None:
    """Make ``upcycle.json`` agree with files that were changed."""
    import json

    record = records.read_record(folder)
    record["files"] = {name: hashing.hash_file(folder / name) for name in record["files"]}
    (folder / records.FILE).write_text(json.dumps(record))


def test_numbers_are_those_of_a_plain_computation(pico: Pico, sparse: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DEMO_FOLDER / "text" / "prose.txt").read_text()[:4000])
    result = upcycle.verify(sparse, text=str(text), tokens=512)
    ids = encode(load_tokenizer(sparse), text.read_text())
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)[:: max(1, len(ids) // 256 - 1)][:2]
    assert result.tokens == ids.numel()
    with torch.no_grad():
        dense, moe = (AutoModelForCausalLM.from_pretrained(f)(ids).logits.double() for f in (pico("llama"), sparse))
    p, q = dense.log_softmax(-1), moe.log_softmax(-1)
    loss = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert result.relative_logit_error == pytest.approx(((moe - dense).norm() / dense.norm()).item(), rel=1e-5)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((dense.argmax(-1) == moe.argmax(-1)).double().mean().item())
    assert result.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert len(result.layer_errors) == 3
    assert all(error > 0.01 for error in result.layer_errors)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_streaming_gives_the_same_numbers(
    target: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"method": "random_split", "top_k": 4, "target": target, "verification": {"tokens": 128}}
    whole = upcycle.convert(str(pico("llama")), tmp_path / "out", **keys).verification
    assert whole is not None
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    streamed = upcycle.verify(tmp_path / "out", tokens=128)
    assert streamed.streamed
    assert not whole.streamed
    assert streamed.relative_logit_error == pytest.approx(whole.relative_logit_error, rel=1e-5)
    assert streamed.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert streamed.layer_errors == pytest.approx(whole.layer_errors, rel=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_streaming_reads_both_layouts(layout: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    result = upcycle.convert(
        str(pico("qwen3")), tmp_path / "out", layout=layout, layers=[1], verification={"tokens": 64}
    )
    assert result.verification is not None
    assert result.verification.streamed
    assert result.verification.verdict == "exact"


def test_a_changed_file_is_named(sparse: Path) -> None:
    weights = sparse / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that was written"):
        upcycle.verify(sparse)


def test_one_wrong_expert_is_found_even_when_few_experts_run(sparse: Path) -> None:
    tensors = load_file(sparse / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.experts.5.w2.weight"
    tensors[name] = tensors[name].roll(1, dims=1)
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    reseal(sparse)
    result = upcycle.verify(sparse, tokens=64)
    assert result.verdict == "broken"
    assert "all experts active" in result.explanation


def test_a_wrong_copy_breaks_an_exact_promise(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "out", experts=4, verification={"enabled": False})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"] *= 1.01
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    reseal(tmp_path / "out")
    result = upcycle.verify(tmp_path / "out", tokens=64)
    assert result.verdict == "broken"
    assert "promised below 1.0e-05" in result.explanation


def test_another_source_is_refused(sparse: Path, pico: Pico) -> None:
    with pytest.raises(CheckpointError, match="is not the checkpoint"):
        upcycle.verify(sparse, source=str(pico("mistral")))


def test_a_source_that_moved_is_an_error_that_names_the_option(dense: Path, tmp_path: Path) -> None:
    upcycle.convert(str(dense), tmp_path / "out", experts=2, verification={"enabled": False})
    moved = dense.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="the dense model is needed") as caught:
        upcycle.verify(tmp_path / "out", tokens=64)
    assert "--source" in (caught.value.hint or "")
    assert upcycle.verify(tmp_path / "out", source=str(moved), tokens=64).verdict == "exact"


def test_a_folder_that_upcycle_did_not_write_is_refused(pico: Pico) -> None:
    with pytest.raises(CheckpointError, match=r"has no upcycle\.json"):
        upcycle.verify(pico("llama"))


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), ("short", "fewer than"), (None, "no such text file")]
)
def test_texts_that_cannot_be_used_are_refused(content: str | None, message: str, sparse: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "t.txt").write_text(content)
    with pytest.raises(UsageError, match=message):
        upcycle.verify(sparse, text=str(tmp_path / "t.txt"))
