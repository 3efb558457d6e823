"""Reads a checkpoint of a run: finds it, checks that it is intact and fits, and gives its tensors to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.files.hashing import hash_file
from upcycle.trainers.checkpoints.whole_tensors import WholeTensors
from upcycle.trainers.checkpoints.write import STATE_FILE, finished
from upcycle.trainers.distributed.gathering import gathered


@dataclass(frozen=True)
class SavedRun:
    """A complete checkpoint: its folder, and the content of its ``trainer.json``."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps of the run so far."""
        return int(self.state["step"])

    def restore(self, tensors: WholeTensors, states: bool = True) -> None:
        """Give an engine, whose model was loaded from this folder, its fp32 weights and its optimizer's states.

        Args:
            tensors: the engine's.
            states: whether to restore the optimizer's states and router noise, too; without them a new stage begins.

        Raises:
            CheckpointError: a tensor is missing, or has another shape.
        """
        files = self._files()
        steps = int(self.state["optimizer_steps"]) if states else 0
        if steps:
            tensors.create_states(steps)
        for tensor in tensors.stock_tensors:
            shape = tensors.shape(tensor)
            if tensor.exported:
                tensors.set_weights(tensor, self._read(files, tensor.name, shape))
            elif states:
                value = self._read(files, f"weight:{tensor.name}", shape)
                tensors.set_weights(tensor, value)
                _overwrite(tensor.parts[0], value)
            if tensor.trained and steps:
                for key in tensors.keys:
                    tensors.set_state(tensor, key, self._read(files, f"{key}:{tensor.name}", shape))

    def load_into(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors of this checkpoint into weights of a model that was loaded from elsewhere.

        Args:
            weights: by the names that they have in the checkpoint.

        Raises:
            CheckpointError: one is missing, or has another shape.
        """
        files = self._files()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self._read(files, name, tuple(weight.shape)))

    def check_files(self, part: int = 0, parts: int = 1) -> None:
        """Compare files with the hashes they had when they were written.

        Args:
            part: which share of the files to check, from 0.
            parts: into how many shares they are divided.

        Raises:
            CheckpointError: a file is missing or has changed.
        """
        hashes = {**self.state["files"], **self.state.get("small_files", {})}
        for name, expected in list(hashes.items())[part::parts]:
            path = self.folder / name
            outside = Path(name).is_absolute() or ".." in Path(name).parts
            if outside or not path.is_file() or hash_file(path) != expected:
                raise CheckpointError(
                    f"{path} is missing, or not the file that was written (its SHA-256 differs)",
                    hint=f"use an older checkpoint: move {self.folder} away, and the run continues from the one before it",
                )

    def _files(self) -> dict[str, SafetensorsFile]:
        files = [SafetensorsFile(self.folder / name) for name in self.state["files"]]
        return {name: file for file in files for name in file.specs}

    def _read(self, files: dict[str, SafetensorsFile], name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in files:
            raise CheckpointError(
                f"{self.folder} has no '{name}'", hint="it was saved with other stages, losses or another optimizer"
            )
        if files[name].specs[name].shape != shape:
            raise CheckpointError(
                f"{self.folder}: '{name}' has shape {list(files[name].specs[name].shape)}, and the model's has {list(shape)}",
                hint="this is a checkpoint of another model",
            )
        return files[name].read(name)


def _overwrite(part: torch.Tensor, value: torch.Tensor) -> None:
    """Copy ``value`` into a weight that the stock class lacks, so that loading the model did not set it."""
    with gathered(part, modifier=0), torch.no_grad():
        part.copy_(value)


def open_checkpoint(folder: Path) -> SavedRun:
    """The checkpoint in ``folder``; the contents of its files are not compared with their hashes yet.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: it is not a complete checkpoint, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="name a folder such as RUN/checkpoints/step-00000100")
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint of a training run: it has no {STATE_FILE}",
            hint="name a folder such as RUN/checkpoints/step-00000100",
        )
    try:
        state = read_json(path, nan=True)
        files = state["files"]
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint="use an older checkpoint of the run") from None
    for name in files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing", hint="use an older checkpoint of the run")
        SafetensorsFile(folder / name)  # raises an error if the file is shorter or longer than its header says
    return SavedRun(folder, state)


def latest(run: Path) -> SavedRun | None:
    """The newest complete checkpoint of a run, or ``None``.

    Raises:
        CheckpointError: it is damaged.
    """
    found = finished(run)
    return open_checkpoint(found[-1]) if found else None
