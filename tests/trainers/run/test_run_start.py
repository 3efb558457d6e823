"""Checks before a run begins or continues: one folder for all ranks, one checkpoint, undamaged weights, room on the disk."""

from __future__ import annotations

import errno
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run

from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.checkpoints.write import finished
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.run import run_start, step_reports
from upcycle.trainers.run.run_start import agreed_checkpoint, check_shared, checkpoint_bytes

Model = Callable[[str], Path]
Usage = namedtuple("Usage", "total used free")


class Together(Ranks):
    """Ranks in threads of one process that exchange through a list."""

    everyone: list[Any]
    meeting: threading.Barrier

    def broadcast(self, value: Any) -> Any:
        return self._exchanged(value)[0]

    def raise_together(self, error: BaseException | None) -> None:
        found = next((each for each in self._exchanged(error) if each), None)
        if found:
            raise error or found

    def _exchanged(self, value: Any) -> list[Any]:
        self.everyone[self.rank] = value
        self.meeting.wait(20)
        found = list(self.everyone)
        self.meeting.wait(20)
        return found


def on_two(act: Callable[[Ranks], Any]) -> list[Any]:
    """What ``act`` gives on each of two ranks, or its error."""
    everyone, meeting = [None, None], threading.Barrier(2)

    def one(rank: int) -> Any:
        ranks = Together(rank, 2, torch.device("cpu"))
        object.__setattr__(ranks, "everyone", everyone)
        object.__setattr__(ranks, "meeting", meeting)
        try:
            return act(ranks)
        except UpcycleError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, (0, 1)))


def test_a_folder_that_a_rank_does_not_see_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_start, "_PATIENCE", 0.2)
    assert on_two(lambda ranks: check_shared(tmp_path, ranks)) == [None, None]
    assert not list(tmp_path.iterdir())
    other = tmp_path / "of another machine"
    other.mkdir()
    for found in on_two(lambda ranks: check_shared(tmp_path if ranks.first else other, ranks)):
        assert isinstance(found, EnvironmentFault)
        assert "is not the folder that the first rank writes to" in found.message


def test_ranks_continue_the_first_ranks_checkpoint_or_none(
    pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_start, "_PATIENCE", 0.2)
    run(recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 4}))
    here, there = tmp_path / "run", tmp_path / "there"
    shutil.copytree(here, there)
    shutil.rmtree(finished(here)[-1])  # rank 0 sees step 2 alone, the other sees step 4 too
    places = (here, there)
    first, second = on_two(lambda ranks: agreed_checkpoint(places[ranks.rank], ranks))
    assert (first.step, second.step) == (2, 2)
    for found in on_two(lambda ranks: agreed_checkpoint(places[1 - ranks.rank], ranks)):
        assert isinstance(found, EnvironmentFault)
        assert "step-00000004 is not the checkpoint that the first rank continues" in found.message
    assert on_two(lambda ranks: agreed_checkpoint(tmp_path / "none", ranks)) == [None, None]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("pattern", ["model-*.safetensors", "optimizer-*.safetensors", "config.json"])
def test_a_flipped_bit_in_a_checkpoint_is_not_trained_on(pico_moe: Model, tmp_path: Path, pattern: str) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 2})
    run(recipe)
    saved = latest(tmp_path / "run")
    assert saved
    (file,) = saved.folder.glob(pattern)
    more = recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update={"steps": 3})]})
    content = file.read_bytes()
    flip(file, len(content) // 2)
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing, or not the file that was written"):
        run(more)
    file.write_bytes(content)
    assert run(more)[0].step == 3


def test_a_flipped_bit_in_the_model_that_training_begins_with(pico: Model, tmp_path: Path) -> None:
    import upcycle

    moe = tmp_path / "moe"
    upcycle.convert(str(pico("llama")), moe, experts=4, top_k=2, verification={"enabled": False})
    (file,) = moe.glob("model*.safetensors")
    flip(file, file.stat().st_size - 100)
    recipe = recipe_for(moe, tmp_path, stage={"steps": 1})
    with pytest.raises(CheckpointError, match=r"model.*safetensors is missing, or not the file that was written"):
        run(recipe)
    (moe / "upcycle.json").unlink()
    assert run(recipe)[0].step == 1


def test_a_disk_without_room_is_said_before_the_first_step(
    pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(
        pico_moe("mixtral"), tmp_path, saving={"every": 2, "keep": 2, "export": True}, stage={"steps": 3}
    )
    sizes: list[int] = []

    def measured(tensors: Any) -> int:
        sizes.append(checkpoint_bytes(tensors))
        return sizes[-1]

    monkeypatch.setattr(run_start, "checkpoint_bytes", measured)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    with pytest.raises(
        EnvironmentFault, match=r"one checkpoint takes .*, the exported model .* has 1 KB left"
    ) as error:
        run(recipe)
    assert error.value.exit_code == 4
    assert not finished(tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * sizes[-1]))
    result, said = run(recipe)
    assert any("2 more checkpoints of" in line for line in said)
    saved = latest(Path(result.output))
    assert saved
    written = sum((saved.folder / name).stat().st_size for name in saved.state["files"])
    assert written == pytest.approx(sizes[-1], rel=0.02)  # and the files' headers


def test_a_log_that_cannot_be_written_ends_the_run_and_not_its_checkpoints(
    pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 4})
    original = step_reports.Reports.record

    def full(self: Any, content: Any) -> None:
        if content["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_reports.Reports, "record", full)
        with pytest.raises(EnvironmentFault, match=r"the disk is full: .* earlier checkpoints are complete"):
            run(recipe)
    assert [path.name for path in finished(tmp_path / "run")] == ["step-00000002"]
    assert run(recipe)[0].step == 4
