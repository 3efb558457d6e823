"""Reads and writes the records beside a model (upcycle.json, verification.json, evaluation.json), and checks the files' hashes."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.formats.parsing import read_json
from upcycle.files.hashing import hash_file
from upcycle.files.local_names import LOCAL_NAMES_FILE as LOCAL_FILE
from upcycle.files.local_names import without_paths
from upcycle.files.names import LOCKS, RECORD, UNFINISHED
from upcycle.files.record_shape import check_record

if TYPE_CHECKING:
    import torch

FILE = RECORD
VERIFICATION_FILE = "verification.json"
EVALUATION_FILE = "evaluation.json"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
BLUEPRINT_FILE = "blueprint.safetensors"
_ABOUT = "upcycle_json_sha256"
_PACKAGES = ("upcycle", "torch", "transformers", "safetensors", "numpy")
UNHASHED = {FILE, VERIFICATION_FILE, EVALUATION_FILE, CARD_FILE, LOCAL_FILE, *UNFINISHED, *LOCKS}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result; ``not installed`` for a missing one."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hash_tokens(windows: torch.Tensor) -> str:
    """Return the SHA-256 of token ids ``[N, W]`` as little-endian 64-bit integers, in hexadecimal digits."""
    return hashlib.sha256(windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of ``upcycle.json``.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: the folder has none, so upcycle did not write it; or its content is not of the form that upcycle writes.
    """
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="name a folder that upcycle convert wrote")
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder} has no {FILE}", hint="name a folder that upcycle convert wrote")
    record = read_json(folder / FILE)
    if "packed" in record:
        raise UsageError(f"{folder} is a packed model", hint=f"write it out first: upcycle unpack {folder} OUT")
    check_record(record, folder / FILE)
    return record


def made_of(folder: Path) -> str:
    """Return the architecture of the model that upcycle made this one of; empty where it did not, or does not say."""
    if not (folder / FILE).is_file():
        return ""
    source = read_json(folder / FILE).get("source")
    family = source.get("family") if isinstance(source, dict) else None
    return family if isinstance(family, str) else ""


def write_verification(folder: Path, result: dict[str, Any]) -> None:
    """Write ``verification.json``: the result, and the hash of the ``upcycle.json`` (and so of the files) that it is about."""
    _write_about(folder, VERIFICATION_FILE, result)


def read_verification(folder: Path) -> dict[str, Any] | None:
    """Return the last verification of the files that ``upcycle.json`` lists; None if there is none, or only of other files."""
    return _read_about(folder, VERIFICATION_FILE)


def write_evaluation(folder: Path, measured: dict[str, Any]) -> None:
    """Add measurements to those of the same files in ``evaluation.json``."""
    _write_about(folder, EVALUATION_FILE, (read_evaluation(folder) or {}) | measured)


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the measurements of the files that ``upcycle.json`` lists; None if there are none, or only of other files."""
    return _read_about(folder, EVALUATION_FILE)


def _write_about(folder: Path, name: str, content: dict[str, Any]) -> None:
    text = json.dumps(without_paths(content) | {_ABOUT: hash_file(folder / FILE)}, indent=2) + "\n"
    write_text_whole(folder / name, text)


def _read_about(folder: Path, name: str) -> dict[str, Any] | None:
    if not (folder / name).is_file():
        return None
    found = read_json(folder / name)
    return found if found.pop(_ABOUT, None) == hash_file(folder / FILE) else None


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Compare every file in ``folder`` with the hash that its record has of it.

    Raises:
        CheckpointError: a file is missing or has changed.
    """
    for name, expected in record["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing", hint="copy it again, or convert again")
        if hash_file(path) != expected:
            raise CheckpointError(
                f"{path} is not the file that was written (its SHA-256 differs)",
                hint="copy it again; files that were changed on purpose cannot be verified",
            )
