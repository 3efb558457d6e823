"""Where a converted model came from: versions, recipe, source and file hashes, in ``upcycle.json``.

Nothing in it depends on the clock or the machine, so that the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.licenses import license_record
from upcycle.checkpoints.mixed_checkpoint import sources_record
from upcycle.errors import CheckpointError
from upcycle.files.atomic_files import TEMPORARY, write_text_whole
from upcycle.files.formats.parsing import read_json
from upcycle.files.hashing import hash_file
from upcycle.files.local_names import FILE as LOCAL_FILE
from upcycle.files.local_names import LocalNames, without_paths
from upcycle.files.output.locks import LOCKS
from upcycle.files.output.ownership import RECORD
from upcycle.files.output.workspace import UNFINISHED
from upcycle.files.record_shape import check_record
from upcycle.planning.cost import AnyJob, Plan
from upcycle.recipe.conversion_recipe import Recipe

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


def versions() -> dict[str, str]:
    """Python and the packages that decide the result; one that is missing says so."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def fingerprint(job: AnyJob, checkpoint: Checkpoint, blueprint: Path | None, read: Sequence[torch.Tensor]) -> str:
    """Identifies a job for resuming: the resolved recipe, the source's content, the calibration tokens and the code's version.

    ``read`` are the token ids that decide layers. How the result is checked does not change it.
    """
    recipe = job.recipe.model_dump(exclude={"verification"})
    given = hash_file(blueprint) if blueprint else None
    tokens = [hash_tokens(windows) for windows in read]
    code = (versions()["upcycle"], versions()["torch"])
    parts = [recipe, checkpoint.fingerprint, checkpoint.version, given, tokens, *code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_tokens(windows: torch.Tensor) -> str:
    """SHA-256 of token ids ``[N, W]`` as little-endian 64-bit integers."""
    return hashlib.sha256(windows.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def text_record(recipe: Recipe, windows: torch.Tensor) -> dict[str, Any]:
    """What is said of the calibration text: its names, how much of it was read, and the SHA-256 of the token ids."""
    return {
        "text": recipe.calibration.texts,
        "tokens": windows.numel(),
        "window": windows.shape[1],
        "token_ids_sha256": hash_tokens(windows),
    }


def write(
    folder: Path,
    job: AnyJob,
    plan: Plan,
    checkpoint: Checkpoint,
    shard_hashes: dict[str, str],
    calibration: dict[str, Any] | None,
    merging: dict[str, Any] | None = None,
) -> None:
    """Write ``upcycle.json``; weight files were hashed while they were written, the small ones are hashed here."""
    hashes = dict(shard_hashes)
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and path.name not in hashes
            and path.name not in UNHASHED
            and not path.name.endswith(TEMPORARY)
        ):
            hashes[path.name] = hash_file(path)
    content: dict[str, Any] = {
        "format": 1,
        "versions": versions(),
        "command": f"upcycle convert {RECIPE_FILE} OUT",
        "seed": job.recipe.seed,
        "source": {
            "name": checkpoint.source.name,
            "revision": checkpoint.source.revision,
            "family": job.family_name,
            "fingerprint": checkpoint.fingerprint,
            "license": license_record(checkpoint),
        },
        "sources": sources_record(checkpoint, job.recipe),
        "method": {"name": job.method.name, "title": job.method.title, "paper": job.method.paper},
        **job.record,
        "calibration": calibration,
        "merging": merging,
        "plan": plan.as_dict(),
        "files": dict(sorted(hashes.items())),
    }
    content = without_paths(LocalNames.of(job.recipe.model_dump()).published(content))
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


UNHASHED = {FILE, VERIFICATION_FILE, EVALUATION_FILE, CARD_FILE, LOCAL_FILE, *UNFINISHED, *LOCKS}


def read(folder: Path) -> dict[str, Any]:
    """Read ``upcycle.json``.

    Raises:
        CheckpointError: the folder was not made by this tool, or the file is none that it wrote.
    """
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder} has no {FILE}", hint="name a folder that upcycle convert wrote")
    record = read_json(folder / FILE)
    check_record(record, folder / FILE)
    return record


def write_verification(folder: Path, result: dict[str, Any]) -> None:
    """Write ``verification.json``: the result, and which ``upcycle.json``, and so which files, it is about."""
    _write_about(folder, VERIFICATION_FILE, result)


def read_verification(folder: Path) -> dict[str, Any] | None:
    """The last verification of the files that ``upcycle.json`` lists, or None: there was none, or it is about other files."""
    return _read_about(folder, VERIFICATION_FILE)


def write_evaluation(folder: Path, measured: dict[str, Any]) -> None:
    """Put what was measured into ``evaluation.json``, beside what else was measured of the same files."""
    _write_about(folder, EVALUATION_FILE, (read_evaluation(folder) or {}) | measured)


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What was measured of the files that ``upcycle.json`` lists, or None."""
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
    """Compare every file with the hash it had when it was written.

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
                hint="copy it again; if you changed it on purpose, verify cannot speak for it",
            )
