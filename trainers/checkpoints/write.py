"""Writes a checkpoint of a run: all ranks at once, each a share of the whole tensors. It gets its name when it is complete.

``step-00000100`` is a folder that stock transformers loads (fp32, experts fused as they are in memory), with the optimizer's
states and ``trainer.json`` beside the weights. It can be continued on any number of ranks, or exported.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit
from upcycle.checkpoints.shard_writer import Journal, ShardWriter
from upcycle.errors import EnvironmentFault
from upcycle.files.atomic_files import sync
from upcycle.files.formats.tensor_files import INDEX
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.hashing import hash_file
from upcycle.files.names import sibling
from upcycle.trainers.checkpoints.whole_tensors import StockTensor, WholeTensors
from upcycle.trainers.distributed.ranks import Ranks

STATE_FILE = "trainer.json"
OPTIMIZER = "optimizer"
CONVERSION = "conversion"
_PARTIAL = ".partial"
_REPLACED = "replaced."


def step_folder(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def finished(run: Path) -> list[Path]:
    """The folders of a run's complete checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if not path.name.endswith(_PARTIAL))


def remove_unfinished(run: Path) -> None:
    """Remove checkpoints that a killed run left incomplete."""
    for path in (run / "checkpoints").glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path)


def put_aside(run: Path) -> None:
    """Rename the checkpoints of a run that begins again; they are removed when its first new one is complete."""
    found = finished(run)
    if found:
        _remove_replaced(run)  # those of an earlier restart
    for path in found:
        path.rename(path.with_name(_REPLACED + path.name))


def _remove_replaced(run: Path) -> None:
    for path in (run / "checkpoints").glob(f"{_REPLACED}step-*"):
        shutil.rmtree(path)


def save(
    run: Path, step: int, tensors: WholeTensors, state: Mapping[str, Any], small: Path, ranks: Ranks, keep: int
) -> Path:
    """Write a checkpoint, and then remove those older than the ``keep`` newest; all ranks must call this together.

    Args:
        run: the run's folder.
        step: optimizer steps of the run so far.
        tensors: the engine's.
        state: everything else to keep, as JSON.
        small: folder whose files are copied into every checkpoint: configuration, tokenizer, records of the conversion.
        ranks: all of them.
        keep: how many checkpoints to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        EnvironmentFault: the disk is full or cannot be written; complete checkpoints stay.
    """
    final = step_folder(run, step)
    folder = sibling(final, _PARTIAL)
    error: BaseException | None = None
    try:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(small, folder)
    except OSError as fault:
        error = disk_fault(fault, folder)
    ranks.raise_together(error)
    hashes = _write_tensors(folder, tensors, ranks)
    try:
        if ranks.first:
            _write_index(folder, tensors, ranks.world_size)
            others = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in hashes]
            small_hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in others}
            content = {
                **{"format": 1, **state, "step": step, "world": ranks.world_size},
                **{"files": hashes, "small_files": small_hashes},
            }
            (folder / STATE_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
            for path in folder.iterdir():
                sync(path)
            shutil.rmtree(final, ignore_errors=True)
            folder.rename(final)
            sync(final.parent)
            for old in finished(run)[:-keep]:
                shutil.rmtree(old)
            _remove_replaced(run)
    except OSError as fault:
        error = disk_fault(fault, folder)
    ranks.raise_together(error)
    return final


def _write_tensors(folder: Path, tensors: WholeTensors, ranks: Ranks) -> dict[str, str]:
    """Write every rank's share of the tensors; returns the SHA-256 of each file of all ranks by its name."""
    tensors.link_states()
    names = _entries(tensors)
    mine = _shares(names, ranks.world_size)[ranks.rank]
    files = {
        kind: _Share(folder, _file(kind, ranks), [entry for entry in mine if _kind(entry) == kind]) for kind in _KINDS
    }
    for tensor in tensors.stock_tensors:
        for name in _names(tensor, tensors):
            # All ranks take part in gathering a tensor; the one whose share it is in writes it.
            value = _value(tensors, tensor, name)
            for share in files.values():
                share.write(name, value)
    hashes: dict[str, str] = {}
    error: BaseException | None = None
    for share in files.values():
        try:
            hashes.update(share.close())
        except OSError as fault:
            error = disk_fault(fault, folder)
    if error is not None and ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        ranks.raise_together(error)
    except EnvironmentFault:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if ranks.world_size == 1:
        return hashes
    everyone: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(everyone, hashes)
    return {name: digest for theirs in everyone for name, digest in theirs.items()}


_KINDS = ("model", OPTIMIZER)


def _kind(entry: OutputEntry) -> str:
    return OPTIMIZER if ":" in entry.name else "model"


def _file(kind: str, ranks: Ranks) -> str:
    return f"{kind}-{ranks.rank + 1:05d}-of-{ranks.world_size:05d}.safetensors"


def _names(tensor: StockTensor, tensors: WholeTensors) -> list[str]:
    """The names under which a tensor is stored: ``name``, ``key:name`` for states, ``weight:name`` if no stock class has it."""
    names = [tensor.name if tensor.exported else f"weight:{tensor.name}"]
    return names + ([f"{key}:{tensor.name}" for key in tensors.keys] if tensor.trained and tensors.steps_taken else [])


def _value(tensors: WholeTensors, tensor: StockTensor, name: str) -> torch.Tensor:
    key, _, rest = name.partition(":")
    return tensors.state(tensor, key) if rest and key != "weight" else tensors.weights(tensor)


def _entries(tensors: WholeTensors) -> list[OutputEntry]:
    return [
        OutputEntry(name, TensorSpec(tensors.shape(tensor), "float32"))
        for tensor in tensors.stock_tensors
        for name in _names(tensor, tensors)
    ]


def _shares(entries: Sequence[OutputEntry], world_size: int) -> list[list[OutputEntry]]:
    """Each rank's entries: the weights, and then the states, are cut in order into parts of about equal size."""
    shares: list[list[OutputEntry]] = [[] for _ in range(world_size)]
    for kind in _KINDS:
        of_kind = [entry for entry in entries if _kind(entry) == kind]
        total, before = sum(entry.spec.nbytes for entry in of_kind), 0
        for entry in of_kind:
            middle = before + entry.spec.nbytes / 2
            shares[min(world_size - 1, int(middle * world_size / max(1, total)))].append(entry)
            before += entry.spec.nbytes
    return shares


class _NoJournal(Journal):
    """A journal that keeps nothing: a checkpoint that was interrupted is written anew, never continued."""

    def __init__(self) -> None:
        self.digests = {}

    def forget(self, units: Any) -> None:
        pass

    def record(self, unit: str, digest: str) -> None:
        pass


class _Share:
    """One rank's file of one kind. A fault is kept until the file is closed, because other ranks still wait for this one."""

    def __init__(self, folder: Path, file: str, entries: list[OutputEntry]) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._file = file
        self._fault: OSError | None = None
        if entries:
            unit = Unit("all", None, tuple(entries))
            self._writer = ShardWriter(folder, Shard(file, (unit,)), _NoJournal())
            try:
                self._writer.__enter__()
            except OSError as fault:
                self._fault = fault
                self._entries = {}

    def write(self, name: str, value: torch.Tensor) -> None:
        if name in self._entries and self._fault is None:
            try:
                self._writer.write(self._entries[name], [value.float().cpu()])
            except OSError as fault:
                self._fault = fault

    def close(self) -> dict[str, str]:
        if not self._entries:
            if self._fault:
                raise self._fault
            return {}
        kind = type(self._fault) if self._fault else None
        self._writer.__exit__(kind, self._fault, None)
        if self._fault:
            raise self._fault
        return {self._file: self._writer.sha256}


def _write_index(folder: Path, tensors: WholeTensors, world_size: int) -> None:
    weights: dict[str, str] = {}
    size = 0
    for rank, share in enumerate(_shares(_entries(tensors), world_size)):
        for entry in share:
            if _kind(entry) == "model":
                weights[entry.name] = f"model-{rank + 1:05d}-of-{world_size:05d}.safetensors"
                size += entry.spec.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": weights}
    (folder / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")


def disk_fault(fault: OSError, folder: Path) -> EnvironmentFault:
    """The error to raise when a run cannot write ``folder`` or a file in it."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return EnvironmentFault(
            f"the disk is full: {folder} could not be written; earlier checkpoints are complete",
            hint="make room, or lower saving.keep; then run the same command again to continue from the last checkpoint",
        )
    return EnvironmentFault(
        f"cannot write {folder}: {fault.strerror or fault}", hint="choose an output you may write to"
    )
