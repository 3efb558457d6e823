"""Similarities of models against cosines column by column."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.methods.mixing import weight_similarity
from upcycle.methods.mixing.weight_similarity import similarities

Branches = Callable[..., list[Path]]


def cosines(one: Path, two: Path, base: Path | None, keep: Callable[[str], bool]) -> float:
    """Mean over tensors of the mean over columns, in plain loops; columns that are zero in both do not count."""
    a, b, c = (load_file(folder / "model.safetensors") if folder else None for folder in (one, two, base))
    assert a is not None
    assert b is not None
    of_tensors = []
    for name in a:
        if not keep(name):
            continue
        x, y = a[name].double().numpy(), b[name].double().numpy()
        if c is not None:
            x, y = x - c[name].double().numpy(), y - c[name].double().numpy()
        x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
        of_columns = []
        for j in range(x.shape[1]):
            lengths = np.sqrt((x[:, j] ** 2).sum()), np.sqrt((y[:, j] ** 2).sum())
            if any(lengths):
                of_columns.append((x[:, j] * y[:, j]).sum() / (lengths[0] * lengths[1]) if all(lengths) else 0.0)
        if of_columns:
            of_tensors.append(sum(of_columns) / len(of_columns))
    return sum(of_tensors) / len(of_tensors)


def opened(folders: list[Path]) -> list[DenseCheckpoint]:
    return [DenseCheckpoint.open(str(folder)) for folder in folders]


def attention_and_ffn(name: str) -> bool:
    return "self_attn" in name or "mlp" in name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi3", "lfm2"])
@pytest.mark.parametrize("rows", [None, 7])
def test_against_plain_loops(
    name: str, rows: int | None, branches: Branches, pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows:
        monkeypatch.setattr(weight_similarity, "SUM_BYTES", 3 * 8 * 32 * rows)
    folders, base = branches(3, 0.5, name), pico(name)
    keep = attention_and_ffn
    if name == "lfm2":
        keep = lambda n: "self_attn" in n or "feed_forward" in n  # noqa: E731
    for against in (None, base):
        found = similarities(opened(folders), opened([base])[0] if against else None)
        assert torch.equal(found, found.T)
        assert found.diagonal().tolist() == [1, 1, 1]
        for i, j in ((0, 1), (1, 2), (0, 2)):
            # fp64 sums of a few thousand products of order one.
            assert found[i, j].item() == pytest.approx(cosines(folders[i], folders[j], against, keep), abs=1e-12)


def test_frozen_tensors_and_columns_say_nothing_of_differences(pico: Callable[[str], Path], tmp_path: Path) -> None:
    base, trained = pico("llama"), "model.layers.1.self_attn.q_proj.weight"
    folders = []
    for i in range(3):
        folders.append(Path(shutil.copytree(base, tmp_path / str(i))))
        tensors = load_file(base / "model.safetensors")
        tensors[trained][:, i:20] += torch.randn(32, 20 - i, generator=torch.Generator().manual_seed(7))
        save_file(tensors, folders[i] / "model.safetensors")
    folders.append(base)
    found = similarities(opened(folders), opened([base])[0])
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert found[i, j].item() == pytest.approx(cosines(folders[i], folders[j], base, attention_and_ffn), abs=1e-12)
    assert found[0, 3] == 0  # all that the one changed, the other left alone
    assert similarities(opened([base, base]), opened([base])[0])[0, 1] == 1


def test_copies_have_similarity_one(branches: Branches) -> None:
    assert similarities(opened(branches(2, 0.0)))[0, 1].item() == pytest.approx(1, abs=1e-14)
