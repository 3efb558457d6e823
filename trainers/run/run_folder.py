"""The folder of a run: whose it is, which files it begins with, and the model that it ends with."""

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
    folder_kind,
    is_run,
    real_path,
)
from upcycle.files.records import RECIPE_FILE
from upcycle.progress import Progress
from upcycle.trainers.adapting.peft_folder import write_peft_folder
from upcycle.trainers.checkpoints.prepare_model import collect_small_files
from upcycle.trainers.checkpoints.read import open_checkpoint
from upcycle.trainers.checkpoints.write import put_aside, remove_unfinished
from upcycle.trainers.data.chat_templates import CHAT_TEMPLATE_FILE
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.recipe.training_recipe import TrainRecipe
from upcycle.trainers.run.run_start import faults_together
from upcycle.trainers.run.step_reports import LOG, Reports

MODEL_FOLDER = "model"  # what a run exports at its end
ADAPTER_FOLDER = "adapter"  # what a run exports that trained an adapter


def check_run_folder(folder: Path, origin: Path, exports: bool, ranks: Ranks) -> None:
    """Refuse a folder in which a run would write over something that is not a run of upcycle.

    Args:
        folder: the run's output.
        origin: folder of the model that is trained; the run may lie neither inside nor around it.
        exports: whether the run will write its model into ``model``.
        ranks: all of them; the first one checks.

    Raises:
        UsageError: the folder is the model's, holds another model, or has files with a run's names that no run wrote.
    """
    with faults_together(ranks):
        if ranks.first:
            _check_run_folder(real_path(folder), origin, exports)


def _check_run_folder(real: Path, origin: Path, exports: bool) -> None:
    check_apart(real, origin, "the model that is trained,", inside=True)
    if real.exists() and not real.is_dir():
        raise UsageError(f"{real} is a file; a run needs a folder", hint="choose another output")
    if not is_run(real):
        if folder_kind(real) in ("result", "working"):
            raise UsageError(f"{real} holds a model, not a training run", hint="choose another output")
        names = (RUN, RECIPE_FILE, LOG, CHECKPOINTS, MODEL_FOLDER, ADAPTER_FOLDER)
        if taken := next((name for name in names if _holds_something(real / name)), None):
            raise UsageError(
                f"{real / taken} was not written by a training run of upcycle, and would be overwritten",
                hint="choose another output, or move it away",
            )
    elif exports:
        for name in (MODEL_FOLDER, ADAPTER_FOLDER):
            check_output(real / name, overwrite=True)


def _holds_something(path: Path) -> bool:
    """Whether there is something to lose: an empty log, which a run that was killed at its start leaves behind, is nothing."""
    if path.is_dir():
        return any(path.iterdir())
    return os.path.lexists(path) and (path.is_symlink() or path.stat().st_size > 0)


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Create the folder, and keep other runs out of it until the block ends.

    Raises:
        UpcycleError: another run is writing it.
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
    """The folder in which a run keeps the files that are copied into every checkpoint."""
    return folder / "checkpoints" / ".small"


def open_run(
    recipe: TrainRecipe,
    folder: Path,
    origin: Path,
    ranks: Ranks,
    restart: bool,
    say: Callable[[str], None],
    step: int,
    template: str | None = None,
) -> Reports | None:
    """Make the folder this run's: write its mark, its recipe, its log and the small files that every checkpoint contains.

    Checkpoints that a killed run left unfinished are removed. With ``restart``, complete ones are put aside, and removed when
    the first new one is complete.

    Args:
        recipe: the run's.
        folder: its output.
        origin: folder of the model that training begins with.
        ranks: all of them; the first one does the work.
        restart: whether the run begins again from its first step.
        say: called with each line that the reports print.
        step: the step that the run continues from.
        template: the chat template that the recipe names, which becomes the model's.

    Returns:
        The reports on the first rank, ``None`` on the others.

    Raises:
        UpcycleError: a tracker is missing, or something cannot be read or written.
    """
    reports: Reports | None = None
    with faults_together(ranks):
        if ranks.first:
            reports = Reports(folder, list(recipe.log.trackers), say, step)  # first, because a tracker may be missing
            write_text_whole(folder / RUN, json.dumps(MADE_BY) + "\n")
            if restart:
                put_aside(folder)
            remove_unfinished(folder)
            for name in (RUN, RECIPE_FILE, LOG):
                for half in folder.glob(f"{name}.*{TEMPORARY}"):
                    half.unlink()
            shutil.rmtree(small_files(folder), ignore_errors=True)
            collect_small_files(origin, small_files(folder))
            if template is not None:
                write_text_whole(small_files(folder) / CHAT_TEMPLATE_FILE, template)
            write_text_whole(folder / RECIPE_FILE, recipe.dump())
    return reports


def export_model(folder: Path, checkpoint: Path | None, ranks: Ranks, say: Callable[[str], None]) -> Path:
    """Write the last checkpoint into the run's ``model`` folder as stock transformers stores it; returns that folder.

    An adapter is written into its ``adapter`` folder, as PEFT stores it.

    Raises:
        UpcycleError: it cannot be written; the checkpoint stays.
    """
    from upcycle.trainers.checkpoints.export import export

    class Says(Progress):
        def note(self, message: str) -> None:
            say(message)

    assert checkpoint
    saved = open_checkpoint(checkpoint)
    out = folder / (ADAPTER_FOLDER if "adapter" in saved.state else MODEL_FOLDER)
    error: BaseException | None = None
    if ranks.first:
        try:
            if "adapter" in saved.state:
                write_peft_folder(saved, out, overwrite=True, progress=Says())
            else:
                export(checkpoint, out, overwrite=True, progress=Says())
        except Exception as fault:
            error = fault
    ranks.raise_together(error)
    return out


def save_batches(folder: Path, step: int, rank: int, batches: Sequence[PackedBatch]) -> Path:
    """Save what a rank read in a step for inspection; returns the file.

    Its tensors are those of each :class:`PackedBatch` by their names, ``ids.0``, ``mask.0``, ``positions.0`` ... of the first pass and
    so on, ``[B, L]`` each.
    """
    from safetensors.torch import save

    path = folder / f"bad-batch-step-{step:08d}-rank-{rank}.safetensors"
    tensors = {
        f"{name}.{number}": part.cpu().clone()
        for number, batch in enumerate(batches)
        for name, part in batch.tensors.items()
    }
    path.write_bytes(save(tensors))
    return path
