"""Weighted means of checkpoints: their numbers, their dtypes, what is in memory, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints import merged_checkpoint
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.checkpoints.merged_checkpoint import MergedCheckpoint, MergedStore
from upcycle.errors import CheckpointError, UsageError

Branches = Callable[..., list[Path]]
WEIGHTS = (0.2, 0.7, 2.0)
EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"


def merge(folders: list[Path], weights: tuple[float, ...] = WEIGHTS, dtype: str = "keep") -> MergedCheckpoint:
    base, *members = [DenseCheckpoint.open(str(folder)) for folder in (folders[0], *folders)]
    return MergedCheckpoint(base, members, weights, dtype)


def mean_of(folders: list[Path], weights: tuple[float, ...] = WEIGHTS) -> dict[str, np.ndarray]:
    """Tensor by tensor, in fp64."""
    stored = [load_file(folder / "model.safetensors") for folder in folders]
    return {
        name: sum(w * one[name].double().numpy() for w, one in zip(weights, stored, strict=True)) / sum(weights)
        for name in stored[0]
    }


def stored_as(folder: Path, to: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(folder, to)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.one_in(2)
@pytest.mark.parametrize("block", [1 << 24, 8 * 32 * 7])  # whole tensors, and rows of the embedding by sevens
def test_every_tensor_is_the_mean_rounded_once(
    block: int, branches: Branches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_checkpoint, "SUM_BYTES", block)
    for dtype in (torch.float32, torch.bfloat16):
        folders = [stored_as(f, tmp_path / f"{dtype}-{i}", dtype) for i, f in enumerate(branches(3))]
        store, expected = merge(folders).store, mean_of(folders)
        assert set(store.specs) == set(expected)
        for name, mean in expected.items():
            found = store.read(name)
            assert found.dtype == dtype
            # Rounded to nearest: at most half a unit, 2^-24 or 2^-8 of the value; the fp64 sums differ by 2^-51.
            half = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
            assert np.all(np.abs(found.double().numpy() - mean) <= half * (1 + 2.0**-40) * np.abs(mean))


@pytest.mark.long
def test_blocks_and_parts_are_rows_of_the_whole(branches: Branches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_checkpoint, "SUM_BYTES", 8 * 32 * 5)
    store = merge(branches(3)).store
    whole = store.read(EMBEDDING)
    for most, part, multiple in ((4 * 32 * 100, None, 1), (4 * 32 * 9, (17, 50), 8), (1, (3, 4), 2)):
        blocks = list(store.chunks(EMBEDDING, most, part, multiple))
        first, count = part or (0, 4096)
        assert torch.equal(torch.cat(blocks), whole[first : first + count])
        assert all(len(block) % multiple == 0 for block in blocks[:-1])
        assert len(blocks[0]) == max(multiple, most // (4 * 32) // multiple * multiple)


def test_a_merge_of_merges(branches: Branches) -> None:
    folders = branches(3)
    (base, *members), (a, b, c) = [DenseCheckpoint.open(str(f)) for f in (folders[0], *folders)], WEIGHTS
    pair = MergedCheckpoint(base, members[:2], (a, b))
    nested = MergedStore((pair, members[2]), (a + b, c), "float64").read(DOWN).numpy()
    # The inner mean is rounded to fp32, the outer is not.
    assert np.allclose(nested, mean_of(folders)[DOWN], rtol=0, atol=2.0**-24 * np.abs(nested).max() * 1.01)


def test_members_of_weight_zero_are_not_read(branches: Branches, tmp_path: Path) -> None:
    one, two = branches(2)
    gone = Path(shutil.copytree(two, tmp_path / "gone"))
    found = merge([one, gone], (3.0, 0.0))
    (gone / "model.safetensors").unlink()
    assert torch.equal(found.store.read(DOWN), load_file(one / "model.safetensors")[DOWN])


def test_the_widest_dtype_where_they_differ(branches: Branches, tmp_path: Path) -> None:
    one, two = branches(2)
    folders = [one, stored_as(two, tmp_path / "halved", torch.bfloat16)]
    with pytest.raises(UsageError, match=r"is float32 in .* and bfloat16 in "):
        merge(folders, (1.0, 1.0))
    store = merge(folders, (1.0, 1.0), "bfloat16").store
    assert store.specs[DOWN].dtype == "float32"
    assert np.allclose(store.read(DOWN), mean_of(folders, (1.0, 1.0))[DOWN], rtol=2.0**-24, atol=0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["phi3", "gemma", "helium"])  # fused tensors, norms of 1 + w, rows in pairs
def test_a_merge_converts_as_a_folder_with_the_same_numbers_does(
    name: str, branches: Branches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_checkpoint, "SUM_BYTES", 8 * 32 * 50)
    folders = branches(2, 0.3, name)
    found = merge(folders, (1.0, 3.0))
    written = Path(shutil.copytree(folders[0], tmp_path / "merged"))
    save_file({n: found.store.read(n) for n in found.store.specs}, written / "model.safetensors")
    plain = DenseCheckpoint.open(str(written))
    for layer in range(3):
        for part, origin in found.family.ffn_origins(found.config, layer).items():
            assert torch.equal(getattr(found.feed_forward(layer), part), getattr(plain.feed_forward(layer), part))
            assert torch.equal(torch.cat(list(found.blocks(origin))), plain.whole(origin))
    for origin in (Origin(EMBEDDING), found.family.origin(found.config, "model.layers.0.self_attn.q_proj.weight")):
        assert torch.equal(torch.cat(list(found.blocks(origin))), plain.whole(origin))


def test_what_it_says_of_itself(branches: Branches, tmp_path: Path) -> None:
    one, two = branches(2)
    two = Path(shutil.copytree(two, tmp_path / "two"))
    base = DenseCheckpoint.open(str(one))
    members = [DenseCheckpoint.open(str(folder)) for folder in (one, two)]
    found = MergedCheckpoint(base, members, (1.0, 2.0))
    assert found.source.name == f"{one} + {two}"
    assert found.source.path == one
    assert found.paths == [one, two, one]
    assert found.fingerprint == MergedCheckpoint(base, members, (1.0, 2.0)).fingerprint
    assert found.fingerprint != MergedCheckpoint(base, members, (2.0, 1.0)).fingerprint
    assert found.store.location(DOWN) == f"{one}/model.safetensors + {two}/model.safetensors"
    found.check_unchanged()
    (two / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="changed while it was read"):
        found.check_unchanged()


def test_the_member_that_is_damaged_is_named(branches: Branches, tmp_path: Path) -> None:
    one, two = branches(2)
    two = Path(shutil.copytree(two, tmp_path / "two"))
    tensors = load_file(two / "model.safetensors")
    tensors[DOWN][3, 4] = float("nan")
    save_file(tensors, two / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{two}/model.safetensors: tensor '{DOWN}' holds NaN"):
        merge([one, two], (1.0, 1.0)).store.read(DOWN)


def test_unlike_members_are_refused(branches: Branches, tmp_path: Path) -> None:
    one, two = branches(2)
    two = Path(shutil.copytree(two, tmp_path / "two"))
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(UsageError, match="'rms_norm_eps' is 1e-06"):
        merge([one, two], (1.0, 1.0))


@pytest.mark.long
def test_copies_are_their_mean_to_the_last_bit(branches: Branches, tmp_path: Path) -> None:
    copies = branches(3, 0.0)
    found = merge(copies, (1.0, 1.0, 1.0)).store
    for name, tensor in load_file(copies[0] / "model.safetensors").items():
        assert torch.equal(found.read(name), tensor)
    result = upcycle.convert(
        None, tmp_path / "out", method="branch_train_merge", sources=list(map(str, copies)), verification={"tokens": 64}
    )
    assert result.verification is not None
    assert (result.verification.verdict, result.verification.max_logit_difference) == ("exact", 0.0)
