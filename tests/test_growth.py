"""Growth steps on several sources: what is copied is their average."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import upcycle
from upcycle.methods.growth import DenseGrowth, Promise
from upcycle.mixing import Mix
from upcycle.registry import METHODS

QUICK: dict[str, Any] = {"tokenizer": "none", "verification": {"tokens": 64}}


class Mean(DenseGrowth):
    """A dense model whose every tensor is the weighted mean of the sources'."""

    name, title, paper = "mean", "Mean", None
    takes_sources = True

    def join(self, mix: Mix | None) -> None:
        self.mix = mix

    @property
    def rest(self) -> tuple[float, ...]:
        assert self.mix is not None
        return (*self.mix.weights, 0.0)

    def layers(self, count: int) -> Sequence[int]:
        return range(count)

    def promise(self, count: int) -> Promise:
        return "approximate", "a mean"


@pytest.fixture
def mean(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mean_of_sources")
    module.Mean = Mean  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(METHODS, "mean", "mean_of_sources:Mean")


@pytest.mark.usefixtures("mean")
def test_what_is_copied_of_several_sources_is_their_weighted_mean(
    branches: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folders = branches(3)
    sources = [{"name": str(folder), "weight": weight} for folder, weight in zip(folders, (1, 2, 5), strict=True)]
    result = upcycle.convert(None, tmp_path / "out", method="mean", sources=sources, **QUICK)
    assert result.verification is not None
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert result.verification.compared_tensors == len(written)
    stored = [load_file(folder / "model.safetensors") for folder in folders]
    for name, tensor in written.items():
        expected = sum(w / 8 * one[name].double() for w, one in zip((1, 2, 5), stored, strict=True))
        # One rounding to fp32, and sums of fp64 in another order.
        torch.testing.assert_close(tensor, expected.float(), rtol=2**-23, atol=1e-12)  # type: ignore[union-attr]
    assert upcycle.verify(tmp_path / "out", tokens=64) == result.verification
    assert upcycle.convert(str(tmp_path / "out"), tmp_path / "moe", experts=2, **QUICK).verification is not None
