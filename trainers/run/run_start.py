"""Checks before a run begins or continues: all ranks see one folder and checkpoint, weights are intact, the disk has room."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError
from upcycle.files.formats.parsing import read_json
from upcycle.files.hashing import hash_file
from upcycle.formatting import size
from upcycle.trainers.checkpoints.read import SavedRun, open_checkpoint
from upcycle.trainers.checkpoints.whole_tensors import WholeTensors
from upcycle.trainers.checkpoints.write import STATE_FILE, disk_fault, finished
from upcycle.trainers.distributed.ranks import Ranks

_SEEN = ".seen-by-all-ranks"
_RECORD = "upcycle.json"
_PATIENCE = 10.0  # seconds until a network file system must show what another machine wrote
_FLOAT32 = 4


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Make sure that all ranks see the same folder: the first writes a random word there, and all read it.

    Raises:
        EnvironmentFault: a rank does not see it; names its machine.
    """
    if ranks.world_size == 1:
        return
    path, word = folder / _SEEN, ranks.broadcast(secrets.token_hex(8))
    with faults_together(ranks):
        if ranks.first:
            path.write_text(word, encoding="utf-8")
    with faults_together(ranks):
        if not _appears(lambda: path.read_text(encoding="utf-8") == word):
            raise EnvironmentFault(
                f"on {socket.gethostname()}, {folder} is not the folder that the first rank writes to",
                hint="choose an output on a file system that all machines of the run share",
            )
    if ranks.first:
        path.unlink(missing_ok=True)


def agreed_checkpoint(run: Path, ranks: Ranks) -> SavedRun | None:
    """The newest complete checkpoint of a run, the same on all ranks, every file of it compared with its hash.

    Each rank reads a share of the files for this, at 1 to 2 GB/s or as fast as the disk is.

    Returns:
        The checkpoint that the first rank sees, or ``None`` if there is none.

    Raises:
        CheckpointError: a file is damaged; names it.
        EnvironmentFault: a rank does not see this checkpoint.
    """
    newest = ranks.broadcast(finished(run)[-1].name if ranks.first and finished(run) else None)
    if newest is None:
        return None
    folder = run / "checkpoints" / newest
    state = ranks.broadcast(_digest(folder / STATE_FILE) if ranks.first else None)
    saved: SavedRun | None = None
    with faults_together(ranks):
        if not _appears(lambda: _digest(folder / STATE_FILE) == state):
            raise EnvironmentFault(
                f"on {socket.gethostname()}, {folder} is not the checkpoint that the first rank continues",
                hint="choose an output on a file system that all machines of the run share",
            )
        saved = open_checkpoint(folder)
        saved.check_files(ranks.rank, ranks.world_size)
    return saved


def check_model(model: Path, ranks: Ranks) -> None:
    """Compare the weights of ``model`` with the hashes that its conversion recorded, if it did.

    Raises:
        CheckpointError: a file is damaged or missing; names it.
    """
    with faults_together(ranks):
        record = read_json(model / _RECORD) if (model / _RECORD).is_file() else {}
        files = record.get("files") if isinstance(record, dict) else None
        weights = sorted(name for name in files or {} if name.endswith(".safetensors") and Path(name).name == name)
        for name in weights[ranks.rank :: ranks.world_size]:
            path = model / name
            if not path.is_file() or hash_file(path) != (files or {})[name]:
                raise CheckpointError(
                    f"{path} is missing, or not the file that was written (its SHA-256 differs)",
                    hint=f"copy or convert it again; if you changed it on purpose, remove {model / _RECORD}",
                )


def check_room(run: Path, tensors: WholeTensors, saves: int, keep: int, export: int, ranks: Ranks) -> str | None:
    """Check that the disk has room for a stage's checkpoints and for the model that is exported at the end.

    Args:
        run: the run's folder.
        tensors: of the stage's engine.
        saves: how many checkpoints it will write.
        keep: how many of them are kept.
        export: bytes of the exported model, 0 if none will be exported.
        ranks: all of them.

    Returns:
        A warning if one checkpoint fits, but not all that will exist at the same time.

    Raises:
        EnvironmentFault: not even one fits.
    """
    warning: str | None = None
    with faults_together(ranks):
        if ranks.first:
            one, free = checkpoint_bytes(tensors), shutil.disk_usage(run).free
            # One more than are kept: the oldest is removed only after the new one is complete.
            there = len(finished(run))
            at_once = max(1, min(keep + 1, there + saves) - there)
            if one + export > free:
                more = f", the exported model {size(export)}" if export else ""
                raise EnvironmentFault(
                    f"one checkpoint takes {size(one)}{more}, and the disk of {run} has {size(free)} left",
                    hint="make room, choose an output on another disk, or saving.export=false and export elsewhere later",
                )
            if at_once * one + export > free:
                warning = (
                    f"up to {at_once} more checkpoints of {size(one)} will exist at once, and the disk of {run} has {size(free)} "
                    "left: lower saving.keep, or make room"
                )
    return warning


def checkpoint_bytes(tensors: WholeTensors) -> int:
    """Bytes of a checkpoint: fp32 weights, and the optimizer's states of what trains."""
    return sum(
        math.prod(tensors.shape(tensor)) * _FLOAT32 * (1 + (len(tensors.keys) if tensor.trained else 0))
        for tensor in tensors.stock_tensors
    )


@contextmanager
def explained_writes(folder: Path) -> Iterator[None]:
    """Turn failures to write into ``folder`` into errors that say what is wrong: a full disk, or a missing right.

    Raises:
        EnvironmentFault: says what is complete, and how to continue.
    """
    try:
        yield
    except OSError as fault:
        within = fault.filename is not None and str(fault.filename).startswith(str(folder))
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not within:
            raise
        raise disk_fault(fault, Path(os.fsdecode(fault.filename)) if within else folder) from fault


@contextmanager
def faults_together(ranks: Ranks) -> Iterator[None]:
    """Raise on all ranks what fails on one of them inside this block, so that none waits for it forever."""
    error: BaseException | None = None
    try:
        yield
    except UpcycleError as fault:
        error = fault
    except OSError as fault:
        error = EnvironmentFault(str(fault), hint="choose an output that can be read and written")
    ranks.raise_together(error)


def _appears(there: Callable[[], bool]) -> bool:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            if there():
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
