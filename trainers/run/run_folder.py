"""The folder of a run: one process group at a time, what is in it before training, and what it keeps when things go wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from upcycle.errors import UpcycleError, UsageError
from upcycle.files.atomic_files import TEMPORARY, write_text_whole
from upcycle.files.output.locks import FolderLock
from upcycle.files.output.ownership import (
    CHECKPOINTS,
    MADE_BY,
    RUN,
    cannot_write,
    check_apart,
    check_output,
    is_run,
    kind_of,
    real_path,
)
from upcycle.progress import Progress
from upcycle.trainers.checkpoints.load_model import collect_small_files
from upcycle.trainers.checkpoints.write import put_aside, remove_unfinished
from upcycle.trainers.data.batches import PackedBatch
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.recipe.training_recipe import TrainRecipe
from upcycle.trainers.run.run_start import faults_together
from upcycle.trainers.run.step_reports import LOG, Reports

RECIPE_FILE = "recipe.yaml"
MODEL_FOLDER = "model"  # what a run exports at its end


def check_run_folder(folder: Path, origin: Path, exports: bool, ranks: Ranks) -> None:
    """Refuse a folder in which a run would write over something that is not a run of upcycle.

    Args:
        folder: the run's output.
        origin: the model that is trained; the run may neither lie in it nor around it.
        exports: whether the run will write its model into ``model``.
        ranks: the first one looks.

    Raises:
        UsageError: it is the model's, holds another model, or files of somebody else that have the names of a run's.
    """
    with faults_together(ranks):
        if ranks.first:
            _check_run_folder(real_path(folder), origin, exports)


def _check_run_folder(real: Path, origin: Path, exports: bool) -> None:
    check_apart(real, origin, "the model that is trained,", inside=True)
    if real.exists() and not real.is_dir():
        raise UsageError(f"{real} is a file, and a run is a folder", hint="choose another output")
    if not is_run(real):
        if kind_of(real) in ("result", "working"):
            raise UsageError(f"{real} holds a model, not a training run", hint="choose another output")
        names = (RUN, RECIPE_FILE, LOG, CHECKPOINTS, MODEL_FOLDER)
        if taken := next((name for name in names if _holds_something(real / name)), None):
            raise UsageError(
                f"{real / taken} was not written by a training run of upcycle, and would be written over",
                hint="choose another output, or move it away",
            )
    elif exports:
        check_output(real / MODEL_FOLDER, overwrite=True)


def _holds_something(path: Path) -> bool:
    """An empty file, such as the log that a run killed at its very start had opened, has nothing to lose."""
    if path.is_dir():
        return any(path.iterdir())
    return os.path.lexists(path) and (path.is_symlink() or path.stat().st_size > 0)


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Make the folder, and keep other runs out of it.

    Raises:
        UpcycleError: another process trains into it.
        EnvironmentFault: it cannot be written.
    """
    error: BaseException | None = None
    lock = FolderLock(folder, f"another run is writing {folder}")
    if ranks.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except UpcycleError as fault:
            error = fault
        except OSError as fault:
            error = cannot_write(folder, fault)
    try:
        ranks.raise_together(error)
        yield
    finally:
        lock.release()


def small_files(folder: Path) -> Path:
    """Where a run keeps the files that go into every checkpoint."""
    return folder / "checkpoints" / ".small"


def open_run(
    recipe: TrainRecipe,
    folder: Path,
    origin: Path,
    ranks: Ranks,
    restart: bool,
    say: Callable[[str], None],
    step: int,
) -> Reports | None:
    """Make the folder this run's, once nothing can be refused any more: its mark, its recipe, its log and the small files.

    What a killed run was saving is removed. With ``restart`` the checkpoints are put aside until the first new one is complete.

    Args:
        recipe: of the run.
        folder: its output.
        origin: the model that training begins with.
        ranks: the first one does it.
        restart: whether it begins anew.
        say: is told what the reports say.
        step: the one that it goes on from.

    Returns:
        The first rank's reports.

    Raises:
        UpcycleError: a tracker is missing, or something cannot be read or written.
    """
    reports: Reports | None = None
    with faults_together(ranks):
        if ranks.first:
            reports = Reports(folder, list(recipe.log.trackers), say, step)  # a tracker is missed before all else
            write_text_whole(folder / RUN, json.dumps(MADE_BY) + "\n")
            if restart:
                put_aside(folder)
            remove_unfinished(folder)
            for name in (RUN, RECIPE_FILE, LOG):
                for half in folder.glob(f"{name}.*{TEMPORARY}"):
                    half.unlink()
            shutil.rmtree(small_files(folder), ignore_errors=True)
            collect_small_files(origin, small_files(folder))
            write_text_whole(folder / RECIPE_FILE, recipe.dump())
    return reports


def export_model(folder: Path, checkpoint: Path | None, ranks: Ranks, say: Callable[[str], None]) -> Path:
    """What a run ends with: its last checkpoint as stock transformers store it, in ``model``.

    Raises:
        UpcycleError: it cannot be written; the checkpoint stays.
    """
    from upcycle.trainers.checkpoints.export import export

    class Says(Progress):
        def note(self, message: str) -> None:
            say(message)

    out = folder / MODEL_FOLDER
    error: BaseException | None = None
    if ranks.first:
        assert checkpoint
        try:
            export(checkpoint, out, overwrite=True, progress=Says())
        except Exception as fault:
            error = fault
    ranks.raise_together(error)
    return out


def save_batches(folder: Path, step: int, rank: int, batches: Sequence[PackedBatch]) -> Path:
    """Keep what a rank read in a step, to look at: ``ids.0``, ``mask.0``, ``positions.0`` of the first pass, and so on."""
    from safetensors.torch import save_file

    path = folder / f"bad-batch-step-{step:08d}-rank-{rank}.safetensors"
    tensors = {
        f"{name}.{number}": getattr(batch, name).cpu().clone()
        for number, batch in enumerate(batches)
        for name in ("ids", "mask", "positions")
    }
    save_file(tensors, path)
    return path
