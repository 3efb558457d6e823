"""How converted models run: tokens with a cache, saving and loading again, and in bfloat16, for every family and target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import COMMON, PICO
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.registry import load

COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "tokenizer": "none"}
COPIES["verification"] = {"enabled": False}


def cells() -> list[tuple[str, str]]:
    """The first pico model of every family with every target that holds it."""
    found: dict[tuple[str, str], str] = {}
    for name, (family, changes) in PICO.items():
        config = load("family", family)().config({**COMMON, **changes, "model_type": family})
        for target in load("family", family).targets:
            if not load("target", target)().lacks(config):
                found.setdefault((family, target), name)
    return [(name, target) for (_, target), name in found.items()]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm(a.float() - b) / torch.linalg.norm(b))


@pytest.mark.one_in(24)
@pytest.mark.parametrize(("name", "target"), cells())
def test_a_converted_model_runs_as_the_dense_one_does(
    name: str, target: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    upcycle.convert(str(pico(name)), tmp_path / "out", target=target, **COPIES)
    ids = torch.randint(1, 4096, (2, 40), generator=torch.Generator().manual_seed(7))
    dense, moe = loaded(pico(name)), loaded(tmp_path / "out")
    greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = dense.generate(ids, use_cache=False, **greedy)
    assert torch.equal(moe.generate(ids, use_cache=True, **greedy), written)

    moe.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        exact, before = dense(written).logits, moe(written).logits
        assert torch.equal(loaded(tmp_path / "again")(written).logits, before)
        own = distance(loaded(pico(name), torch.bfloat16)(written).logits, exact)
        error = distance(loaded(tmp_path / "out", torch.bfloat16)(written).logits, exact)
    # Both are sums of as many roundings, at other places: each expert's output, and the sum of them.
    assert error < 2 * own
