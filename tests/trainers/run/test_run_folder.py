"""One run per folder, which holds nothing but that run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.run.run_folder import check_run_folder, locked, save_batches

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    first = locked(tmp_path / "run", ALONE)
    with first, pytest.raises(UpcycleError, match="another run is writing"), locked(tmp_path / "run", ALONE):
        pass
    with locked(tmp_path / "run", ALONE):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"), locked(tmp_path / "file" / "run", ALONE):
        pass


def test_batches_of_a_step_are_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ids = torch.arange(6).view(2, 3)
    batch = PackedBatch(ids, ids > 0, ids % 3, ("a", "b"), compared=ids > 2)
    found = load_file(save_batches(tmp_path, 7, 1, [batch, batch]))
    assert set(found) == {f"{name}.{number}" for name in ("ids", "mask", "positions", "compared") for number in (0, 1)}
    assert torch.equal(found["ids.1"], ids)
    assert torch.equal(found["mask.0"], ids > 0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["moe", ".", "moe/run", "link", "link/deeper"])
def test_a_run_is_kept_apart_from_its_model(converted: Callable[..., Path], tmp_path: Path, place: str) -> None:
    import shutil

    shutil.copytree(converted("moe", experts=2), tmp_path / "moe")
    (tmp_path / "link").symlink_to("moe")
    before = files(tmp_path / "moe")
    recipe = recipe_for(tmp_path / "moe", tmp_path).model_copy(update={"output": str(tmp_path / place)})
    with pytest.raises(UsageError, match="the model that is trained"):
        run(recipe)
    assert files(tmp_path / "moe") == before
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "log.jsonl", "run.json", "checkpoints/mine", "model/config.json", "upcycle.json"]
)
def test_a_folder_with_other_files_is_not_taken_for_a_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UsageError, match="was not written by a training run") if name != "upcycle.json" else _allowed():
        check_run_folder(tmp_path / "run", tmp_path / "model", True, ALONE)
    assert path.read_text() == "mine"


def _allowed() -> Any:
    """A name that a run does not write: it stays beside it, as the log of a cluster does."""
    return contextlib.nullcontext()


def test_the_empty_log_of_a_run_killed_at_its_start_is_no_obstacle(tmp_path: Path) -> None:
    log, origin = tmp_path / "run" / "log.jsonl", tmp_path / "model"
    log.parent.mkdir()
    log.touch()
    check_run_folder(log.parent, origin, True, ALONE)
    log.write_text("mine\n")
    with pytest.raises(UsageError, match=r"log\.jsonl was not written by a training run"):
        check_run_folder(log.parent, origin, True, ALONE)


@pytest.mark.long
def test_what_a_refused_run_finds_is_what_it_leaves(pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1, "losses": {}})
    run(recipe)
    before = files(tmp_path / "run")
    assert "run.json" in before
    other = recipe.model_copy(update={"seed": 5})
    with pytest.raises(UsageError):
        run(other)
    assert files(tmp_path / "run") == before
    # A new one is found to be right before the old one is thrown away.
    text = (tmp_path / "text.jsonl").read_bytes()
    for spoilt in (b"{", b""):
        (tmp_path / "text.jsonl").write_bytes(spoilt)
        with pytest.raises(UpcycleError):
            run(other, restart=True)
        assert files(tmp_path / "run") == before
    (tmp_path / "text.jsonl").write_bytes(text)
    assert run(other, restart=True)[0].step == 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*step*")) == ["step-00000001"]
    assert "seed: 5" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.long
def test_the_old_checkpoints_stay_until_the_first_new_one(
    pico_moe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1, "losses": {}})
    run(recipe)
    with monkeypatch.context() as patch:
        patch.setattr("upcycle.trainers.run.loop.save", lambda *_: (_ for _ in ()).throw(UpcycleError("killed")))
        for _ in range(2):
            with pytest.raises(UpcycleError, match="killed"):
                run(recipe, restart=True)
            kept = tmp_path / "run" / "checkpoints" / "replaced.step-00000001" / "trainer.json"
            assert kept.exists()
    run(recipe, restart=True)
    assert not kept.exists()
