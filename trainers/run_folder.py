"""The folder of a run: one process group at a time, what is in it before training, and what it keeps when things go wrong."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.trainers.checkpoint_writer import remove_unfinished
from upcycle.trainers.data import Batch
from upcycle.trainers.distributed import Ranks
from upcycle.trainers.model_loading import collect_small_files
from upcycle.trainers.recipe import TrainRecipe
from upcycle.workspace import cannot_write

RECIPE_FILE = "recipe.yaml"


@contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Make the folder, and keep other runs out of it.

    Raises:
        UpcycleError: another process trains into it.
        EnvironmentFault: it cannot be written.
    """
    error: BaseException | None = None
    lock = -1
    if ranks.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = UpcycleError(f"another run is writing {folder}", hint="wait for it, or choose another output")
        except OSError as fault:
            error = cannot_write(folder, fault)
    try:
        ranks.together(error)
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def small_files(folder: Path) -> Path:
    """Where a run keeps the files that go into every checkpoint."""
    return folder / "checkpoints" / ".small"


def prepare_folder(recipe: TrainRecipe, folder: Path, origin: Path, ranks: Ranks, restart: bool) -> None:
    """Write the recipe and the small files; what a killed run was saving is removed, with ``restart`` all checkpoints.

    Raises:
        UpcycleError: something cannot be read or written.
    """
    error: BaseException | None = None
    if ranks.first:
        try:
            if restart:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            remove_unfinished(folder)
            shutil.rmtree(small_files(folder), ignore_errors=True)
            collect_small_files(origin, small_files(folder))
            (folder / RECIPE_FILE).write_text(recipe.dump(), encoding="utf-8")
        except OSError as fault:
            error = cannot_write(folder, fault)
        except UpcycleError as fault:
            error = fault
    ranks.together(error)


def save_batches(folder: Path, step: int, rank: int, batches: Sequence[Batch]) -> Path:
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
