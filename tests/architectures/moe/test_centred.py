"""OLMo 1 in Mixtral: a stream without a mean, so that an RMSNorm is a LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import upcycle

KEYS: dict[str, Any] = {"target": "mixtral", "tokenizer": "none", "verification": {"tokens": 64}}


def test_nothing_that_is_written_adds_a_mean(pico: Callable[[str], Path], tmp_path: Path) -> None:
    upcycle.convert(str(pico("olmo")), tmp_path / "out", experts=2, **KEYS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    added = {name: tensor for name, tensor in tensors.items() if name.endswith(("o_proj.weight", "w2.weight"))}
    assert len(added) == 3 * 3
    for tensor in (*added.values(), tensors["model.embed_tokens.weight"].T):
        assert tensor.mean(0).abs().max() < 1e-7 * tensor.abs().max()
    norms = [tensor for name, tensor in tensors.items() if "norm" in name]
    assert len(norms) == 7
    assert all(torch.equal(norm, torch.ones(32)) for norm in norms)


@pytest.mark.parametrize("method", ["sparse_upcycling", "random_split"])
def test_stored_in_bfloat16_it_promises_no_more_than_rounding(
    method: str, dense_maker: Callable[..., Path], tmp_path: Path
) -> None:
    folder = dense_maker(tmp_path / "dense", "olmo", dtype="bfloat16")
    keys = {**KEYS, "method": method, "experts": 4, "top_k": 4}
    result = upcycle.convert(str(folder), tmp_path / "out", **keys)
    assert any("the means that its LayerNorms take off" in warning for warning in result.plan.warnings)
    assert result.verification is not None
    assert result.plan.promise == "rounded"
    assert result.verification.verdict == "approximate"
    assert result.verification.relative_logit_error < 2**-8  # each weight of down projections is off by 2^-9 at most
    exact = upcycle.convert(str(folder), tmp_path / "wide", dtype="float32", **keys).verification
    assert exact is not None
    assert exact.verdict == "exact"


@pytest.mark.parametrize("change", [0.0, 0.3])
def test_models_are_mixed(change: float, branches: Callable[..., list[Path]], tmp_path: Path) -> None:
    sources = [str(path) for path in branches(2, change, "olmo")]
    keys = {"method": "branch_train_mix", "sources": sources, "top_k": 2, "router": {"name": "zero"}}
    result = upcycle.convert(sources[0], tmp_path / "out", **KEYS, **keys)
    assert result.verification is not None
    assert result.verification.verdict == ("exact" if not change else "approximate")
    assert result.verification.all_experts_error is None or result.verification.all_experts_error < 1e-5
