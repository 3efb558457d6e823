"""A kill at any change of the disk, or in the middle of what is being written, in every kind of work: the same command then ends with
the same bytes and leaves nothing else."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_points import Killed, cut_what_was_being_written, killed_at
from training_runs import recipe_for, run

import upcycle
from upcycle.trainers.checkpoints.export import export

Job = Callable[[Path], object]
CHECKED = {"verification": {"tokens": 64}}
TEXT = {"calibration": {"text": "demo", "tokens": 1024, "window": 64}}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def work(
    pico: Callable[[str], Path], pico_moe: Callable[..., Path], branches: Callable[..., list[Path]], tmp_path: Path
) -> Callable[[str], Job]:
    """Every kind of work, as a function of its OUT."""

    def converting(source: Path | None, **keys: Any) -> Job:
        return lambda out: upcycle.convert(str(source) if source else None, out, **{**CHECKED, **keys})

    def exporting() -> Job:
        recipe = recipe_for(pico_moe("mixtral"), tmp_path / "trained", stage={"steps": 1, "losses": {}})
        run(recipe)
        return lambda out: export(recipe.output, out, max_shard_size="100KB")

    def training(out: Path) -> object:
        recipe = recipe_for(
            pico_moe("mixtral"),
            tmp_path / "training",
            stage={"steps": 2, "losses": {}},
            saving={"every": 1, "export": True},
        )
        return run(recipe.model_copy(update={"output": str(out)}))

    def named(kind: str) -> Job:
        llama = pico("llama")
        sources = [str(path) for path in branches(2)]
        return {
            "copies": lambda: converting(llama, experts=2, max_shard_size="600KB"),
            "split": lambda: converting(
                llama, method="alternating", experts=8, top_k=4, router="ridge", refit="down", **TEXT
            ),
            "mix": lambda: converting(None, method="branch_train_mix", sources=sources, top_k=1),
            "merge": lambda: converting(llama, method="branch_train_merge", sources=sources, **TEXT),
            "growth": lambda: converting(
                pico_moe("mixtral"), method="expert_upcycling", experts=8, parameters={"utility": "saliency"}, **TEXT
            ),
            "export": exporting,
            "train": lambda: training,
        }[kind]()

    return named


def files(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for what a clock writes into the log of a run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "log.jsonl")
    }


def points(count: int, last: int | None, spread: int) -> list[int]:
    """All changes (``last`` is None), or ``spread`` of them and the last ones, among which a result is put in place."""
    if last is None:
        return list(range(1, count + 1))
    return sorted({*range(count // (2 * spread), count, count // spread), *range(count - last + 1, count + 1)})


def killed_everywhere(job: Job, tmp_path: Path, last: int | None = None, spread: int = 1) -> None:
    place = tmp_path / "place"
    out = place / "out"
    place.mkdir()
    with killed_at(place, 0) as changes:
        job(out)
    count, whole = len(changes), files(out)
    assert count > 20
    steps = list(changes)
    for at, cut in itertools.product(points(count, last, spread), (False, True)):
        if cut and not (at > 1 and steps[at - 2].startswith("open ")):
            continue
        shutil.rmtree(place)
        place.mkdir()
        with killed_at(place, at) as done, contextlib.suppress(Killed):
            job(out)
        if cut and not cut_what_was_being_written(at):
            continue  # the kill fell between no bytes
        if (out / "config.json").exists() and not (out / "state.json").exists():
            assert files(out) == whole, f"what looks finished is not: {at} {done[-1]}"
        if not out.exists() or files(out) != whole:  # else the last change was one that does not matter
            job(out)
        assert files(out) == whole, f"{at} {done[-1]}"
        assert [path.name for path in place.iterdir()] == ["out"], f"{at} {done[-1]}"


@pytest.mark.long
def test_killed_at_some_changes_it_ends_the_same(work: Callable[[str], Job], tmp_path: Path) -> None:
    killed_everywhere(work("copies"), tmp_path, last=1, spread=2)


@pytest.mark.slow
def test_a_calibrated_split_killed_at_some_changes_ends_the_same(work: Callable[[str], Job], tmp_path: Path) -> None:
    killed_everywhere(work("split"), tmp_path, last=5, spread=5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copies", "split", "mix", "merge", "growth", "export", "train"])
def test_killed_at_any_change_it_ends_the_same(work: Callable[[str], Job], kind: str, tmp_path: Path) -> None:
    killed_everywhere(work(kind), tmp_path)
