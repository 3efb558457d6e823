"""A configuration says that head and embedding are one, and the weights hold another head: stock transformers runs that one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

Pico = Callable[[str], Path]
HEAD = "lm_head.weight"
IDS = torch.arange(3, 43)[None] * 7


def with_head(source: Path, folder: Path, change: float, tied: bool = True) -> Path:
    """A copy that says that its head is tied, and stores the embedding times ``1 + change * N(0, 1)`` as the head."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    spelt = {"tie_embedding": tied} if config["model_type"].startswith("lfm2") else {}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied, **spelt}))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    factor = 1 + change * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(9))
    tensors[HEAD] = (embedding.float() * factor).to(embedding.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    found: torch.Tensor = model(IDS).logits
    return found


def same(one: Path, other: Path) -> bool:
    a, b = logits(one), logits(other)
    return bool((a - b).norm() <= 1e-5 * a.norm())


@pytest.mark.one_in(7)
@pytest.mark.parametrize("name", ["llama", "gemma", "granite", "cohere2", "lfm2", "phi4-mini", "qwen2"])
def test_the_stored_head_is_kept(name: str, pico: Pico, tmp_path: Path) -> None:
    source = with_head(pico(name), tmp_path / "dense", 0.5)
    assert not same(source, pico(name)) or name == "llama"
    result = upcycle.convert(str(source), tmp_path / "out", experts=2, verification={"tokens": 32})
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert same(source, tmp_path / "out")


def test_a_stored_copy_of_the_embedding_is_no_head(pico: Pico, tmp_path: Path) -> None:
    checkpoint = DenseCheckpoint.open(str(with_head(pico("llama-rope"), tmp_path / "dense", 0.0)))
    assert checkpoint.config.tie_word_embeddings


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("kind", "method"), [("dense", "depth_stack"), ("moe", "expert_upcycling")])
def test_growth_keeps_the_stored_head(kind: str, method: str, pico: Pico, pico_moe: Pico, tmp_path: Path) -> None:
    source = with_head(pico("llama") if kind == "dense" else pico_moe("mixtral"), tmp_path / "source", 0.5)
    keys: dict[str, Any] = {"parameters": {"growth": 1}} if kind == "dense" else {"experts": 8}
    upcycle.convert(str(source), tmp_path / "out", method=method, verification={"tokens": 32}, **keys)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[HEAD], load_file(source / "model.safetensors")[HEAD])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight.data, written[HEAD].float())


def test_a_merge_averages_the_heads(branches: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = [with_head(folder, tmp_path / str(i), 0.5 + i) for i, folder in enumerate(branches(2))]
    upcycle.convert(
        None, tmp_path / "out", sources=[str(f) for f in folders], method="branch_train_mix",
        router="random", top_k=2, verification={"tokens": 32},
    )  # fmt: skip
    heads = [load_file(folder / "model.safetensors")[HEAD] for folder in folders]
    written = load_file(tmp_path / "out" / "model.safetensors")[HEAD]
    assert torch.allclose(written, (heads[0] + heads[1]) / 2, rtol=1e-6, atol=0)


def test_a_moe_with_a_copy_of_the_embedding_is_tied(pico_moe: Pico, tmp_path: Path) -> None:
    assert MoeCheckpoint.open(str(with_head(pico_moe("mixtral"), tmp_path / "moe", 0.0))).model.tied
