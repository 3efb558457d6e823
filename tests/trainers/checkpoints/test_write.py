"""How a checkpoint's tensors are shared out among ranks, and which folders count."""

from __future__ import annotations

from pathlib import Path

import pytest

from upcycle.checkpoints.output_layout import OutputEntry
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.trainers.checkpoints.write import _shares, finished, remove_unfinished, step_folder


def entries(sizes: list[int]) -> list[OutputEntry]:
    names = [f"layer.{i}" for i in range(len(sizes))]
    weights = [OutputEntry(name, TensorSpec((size,), "float32")) for name, size in zip(names, sizes, strict=True)]
    states = [
        OutputEntry(f"{key}:{name}", TensorSpec((size,), "float32"))
        for name, size in zip(names, sizes, strict=True)
        for key in ("exp_avg", "exp_avg_sq")
    ]
    return [entry for pair in zip(weights, states[::2], states[1::2], strict=True) for entry in pair]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_tensor_is_written_once_and_by_ranks_alike(world: int) -> None:
    given = entries([100, 5, 60, 60, 3, 80, 20, 90, 40, 40])
    shares = _shares(given, world)
    assert len(shares) == world
    assert sorted(entry.name for share in shares for entry in share) == sorted(entry.name for entry in given)
    total = sum(entry.spec.nbytes for entry in given)
    largest = max(entry.spec.nbytes for entry in given)
    for share in shares:  # of weights and of states, nobody has more than a fair part and one tensor
        assert sum(entry.spec.nbytes for entry in share) <= total / world + 2 * largest


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    for step in (200, 5, 1000):
        step_folder(tmp_path, step).mkdir(parents=True)
    partial = step_folder(tmp_path, 2000)
    partial = partial.with_name(partial.name + ".partial")
    partial.mkdir()
    (partial / "model-00001-of-00001.safetensors").write_text("half")
    assert finished(tmp_path) == [step_folder(tmp_path, step) for step in (5, 200, 1000)]
    remove_unfinished(tmp_path)
    assert not partial.exists()
    assert len(finished(tmp_path)) == 3
