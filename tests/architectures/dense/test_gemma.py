"""Gemma where embeddings cannot be multiplied: the products in the table, the table itself as the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import upcycle
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import VerificationError

UNCHECKED: dict[str, Any] = {"experts": 2, "verification": {"enabled": False}}
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.mark.one_in(4)
@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("name", ["gemma", "gemma-bfloat16"])
def test_embeddings_are_multiplied_and_the_head_is_not(
    target: str, name: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    upcycle.convert(str(pico(name)), tmp_path / "out", target=target, **UNCHECKED)
    dense, made = (load_file(folder / "model.safetensors") for folder in (pico(name), tmp_path / "out"))
    stored = dense[EMBEDDINGS].double().numpy()
    assert str(made[EMBEDDINGS].dtype) == "torch.float32"
    # The factor and the product are rounded to fp32 once each.
    assert np.allclose(made[EMBEDDINGS].double().numpy(), stored * np.sqrt(32), rtol=2 * 2.0**-24, atol=0)
    assert made["lm_head.weight"].dtype == dense[EMBEDDINGS].dtype
    assert np.array_equal(made["lm_head.weight"].double().numpy(), stored)


def test_a_mix_multiplies_the_mean(branches: Callable[..., list[Path]], tmp_path: Path) -> None:
    sources = branches(2, 0.3, "gemma")
    keys = {"method": "branch_train_mix", "target": "mixtral", "verification": {"enabled": False}}
    upcycle.convert(None, tmp_path / "out", sources=list(map(str, sources)), **keys)
    made = load_file(tmp_path / "out" / "model.safetensors")
    one, two = (load_file(source / "model.safetensors")[EMBEDDINGS].double().numpy() for source in sources)
    # Three roundings, each of 2^-24 of the longer of the two: the factor, the products, and their mean.
    bound = 3 * 2.0**-24 * np.sqrt(32) * np.maximum(abs(one), abs(two))
    assert (abs(made[EMBEDDINGS].double().numpy() - (one + two) / 2 * np.sqrt(32)) <= bound).all()
    assert np.array_equal(made["lm_head.weight"].numpy(), ((one + two) / 2).astype(np.float32))


def test_embeddings_that_were_left_as_they_are_break_the_promise(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Origin.apply
    monkeypatch.setattr(Origin, "apply", lambda self, block: right(replace(self, times=1.0), block))
    with pytest.raises(VerificationError, match="relative logit error"):
        upcycle.convert(str(pico("gemma")), tmp_path / "out", target="mixtral", experts=2, verification={"tokens": 64})
