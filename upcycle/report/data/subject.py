"""Finds what a report is about: a finished, failed or stopped conversion, a training run, or a model from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from upcycle.architectures.moe_families import describes_moe
from upcycle.architectures.stored_moe import MoeModel
from upcycle.architectures.usual_keys import usual_keys
from upcycle.errors import UpcycleError, UsageError
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.locate import locate
from upcycle.files.names import sibling
from upcycle.files.output.ownership import real_path, working_folder
from upcycle.files.user_paths import user_path

TRAINING_LOG = "log.jsonl"
SubjectState = Literal["finished", "failed", "unfinished"]


@dataclass(frozen=True)
class Subject:
    """Holds what a report is about.

    Attributes:
        name: as the user wrote it.
        folder: where its files are.
        state: whether the conversion is finished, failed or unfinished.
        record: the content of ``upcycle.json``; None where upcycle did not write the model.
        config: the content of ``config.json``; None where it is unfinished.
        log: the log of its training run.
    """

    name: str
    folder: Path
    state: SubjectState
    record: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    log: Path | None = None

    @property
    def ours(self) -> bool:
        """Whether upcycle wrote the model."""
        return self.record is not None

    @property
    def dense(self) -> bool:
        """Whether it is a dense model that upcycle did not make, with which others are compared."""
        return not self.ours and bool(self.config) and self.state == "finished" and "expert" not in str(self.config)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor, by name.

        Raises:
            CheckpointError: the folder is damaged or holds no safetensors.
        """
        return SafetensorsFolder(self.folder).specs

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The configuration of the text model, by the usual keys: of a model of parts the part's; empty without one."""
        return usual_keys(self.config or {})

    @cached_property
    def moe(self) -> MoeModel | None:
        """The configuration as that of a MoE; None where the model is dense, or upcycle does not know its architecture.

        Raises:
            CheckpointError: the folder is damaged.
        """
        if not self.config or not describes_moe(self.config):
            return None
        return MoeModel.read(self.config, self.specs, self.name)

    @property
    def sides(self) -> tuple[str, str]:
        """What the parent and the model are called where they are compared."""
        kind = str(self.record["plan"]["kind"]) if self.record else ""
        usual = ("dense", "MoE") if self.moe_layers else ("parent", "model")
        if kind in ("growth", "addition", "compression", "narrowing", "beside"):
            return ("before", "after")
        return ("dense", "pruned") if kind == "pruning" else usual

    @property
    def moe_layers(self) -> list[int]:
        """The numbers of the layers with a router, ascending."""
        return self.moe.moe_layers if self.moe else []


def find_subject(name: str, training: Path | None = None) -> Subject:
    """Find what ``name`` means: a folder, ``OUT`` of a stopped or failed conversion, a training run, or a hub id.

    Args:
        name: as on the command line.
        training: a training run's folder or log, where the model is not in it.

    Raises:
        UsageError: there is nothing of that name, or it holds no model.
    """
    given = user_path(name)
    candidates = [given, sibling(given.absolute(), ".failed"), working_folder(real_path(given))]
    folder = next((path for path in candidates if path.is_dir()), None) or locate(name).path
    if not folder.is_dir():
        raise UsageError(
            f"{name} is a file, but a report is about a folder", hint="convert it first, then report on OUT"
        )
    log = _log(folder, training)
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").exists():
        folder = folder / "model"  # the folder of a training run, which has exported its model
    if not (folder / "config.json").exists():
        if log or folder.name.endswith(".partial"):
            return Subject(name, folder, "unfinished", log=log)
        raise UsageError(
            f"{folder} holds no config.json",
            hint="name a folder that upcycle convert or train wrote, or another model's folder",
        )
    record = records.read_record(folder) if (folder / records.FILE).is_file() else None
    state: SubjectState = "failed" if folder.name.endswith(".failed") else "finished"
    if folder.name.endswith(".partial"):
        state = "unfinished"
    return Subject(name, folder, state, record, read_json(folder / "config.json"), log)


def _log(folder: Path, training: Path | None) -> Path | None:
    if training:
        path = training / TRAINING_LOG if training.is_dir() else training
        if not path.is_file():
            raise UsageError(
                f"no training log at {path}", hint=f"--training takes a run's folder or its {TRAINING_LOG}"
            )
        return path
    places = [folder, *([folder.parent] if folder.name == "model" else [])]
    return next((place / TRAINING_LOG for place in places if (place / TRAINING_LOG).is_file()), None)


def missing(reason: str) -> dict[str, Any]:
    """Return what stands in the data in place of a section that cannot be filled."""
    return {"missing": reason}


def reason_of(error: UpcycleError) -> str:
    """Return message and hint of a failure as one sentence."""
    return f"{error.message} ({error.hint})" if error.hint else error.message
