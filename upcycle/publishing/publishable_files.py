"""Decides what may be published from a folder: the files that were recorded when it was made, unchanged and verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.errors import CheckpointError, UsageError, VerificationError
from upcycle.files import records
from upcycle.files.links import inside
from upcycle.files.local_names import LOCAL_NAMES_FILE as LOCAL_FILE
from upcycle.files.names import UNFINISHED
from upcycle.files.output.ownership import INSIDE, real_path, working_folder
from upcycle.files.output.workspace import settle
from upcycle.files.records import CARD_FILE, EVALUATION_FILE, FILE, VERIFICATION_FILE, check_files
from upcycle.progress import Progress
from upcycle.publishing.private_files import check_private
from upcycle.publishing.upload import Upload

# Files of upcycle that are written after the model, and so are not in its record.
REPORTS = ("report.html", "report.json")
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Publishable:
    """Holds what may be published from a folder.

    Attributes:
        folder: the converted model.
        record: the content of its ``upcycle.json``.
        files: the files to publish.
        skipped: names in the folder that are not in its record and are not published.
        mark: why the model should not be relied on, if ``force`` allowed it to be published.
        searched: how many files were searched for private text.
    """

    folder: Path
    record: dict[str, Any]
    files: list[Upload]
    skipped: list[str]
    mark: str | None
    searched: int = 0


def publishable(
    folder: Path, force: bool, progress: Progress, allowed: Sequence[str] = (), owner: str = ""
) -> Publishable:
    """Check a folder, and return what may be sent; every file is hashed and searched, and nothing else is ever sent.

    Args:
        folder: a folder that upcycle wrote.
        force: allow a model that is broken or was not verified.
        progress: receives the progress.
        allowed, owner: see :func:`upcycle.publishing.private_files.check_private`.

    Raises:
        UsageError: there is no such folder, it is unfinished, it was never verified (unless ``force``), or a file holds private
            text.
        VerificationError: the conversion did not keep its promise (unless ``force``; a folder called ``.failed`` is always
            refused).
        CheckpointError: upcycle did not write the folder; or a file is missing, was changed since it was verified, or is a link
            that leaves the folder.
    """
    _check_finished(folder)
    record = records.read_record(folder)
    if not isinstance(record.get("files"), dict) or not any(name.endswith(_WEIGHTS) for name in record["files"]):
        raise CheckpointError(f"{folder / FILE}: key 'files' lists no weights", hint="convert again")
    mark = _verified(folder, force)
    never = {CARD_FILE, LOCAL_FILE}
    present = (FILE, VERIFICATION_FILE, EVALUATION_FILE, *REPORTS)
    for name in (*present, *record["files"], CARD_FILE):
        inside(folder / name, folder)
    with progress.phase("checking files", 1):
        check_files(folder, record)
        progress.advance()
    files = [_upload(folder, name, digest) for name, digest in record["files"].items() if name not in never]
    files += [Upload.of(name, (folder / name).read_bytes()) for name in present if (folder / name).is_file()]
    checked = check_private(files, allowed, owner)
    known = {file.name for file in files} | never
    skipped = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in known)
    return Publishable(folder, record, files, skipped, mark, checked)


def _check_finished(folder: Path) -> None:
    if folder.name.endswith(".failed"):
        raise VerificationError(
            f"the conversion in {folder} did not keep its promise, and is never published",
            hint="convert again; upcycle verify says what is wrong",
        )
    if folder.is_dir():
        settle(folder)  # completes a conversion that was killed while it put its result in place
    unfinished = any((folder / name).exists() for name in (*UNFINISHED, INSIDE))
    partial = folder.name.endswith((".partial", INSIDE)) or unfinished
    if partial or (not folder.exists() and working_folder(real_path(folder)).is_dir()):
        raise UsageError(f"{folder} is not finished", hint="run the conversion's command again, which continues it")
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="name a folder that upcycle convert wrote")


def _verified(folder: Path, force: bool) -> str | None:
    """Return why a model should not be relied on, or None where it is verified."""
    verification = records.read_verification(folder)
    if verification is None:
        if not force:
            raise UsageError(
                f"{folder} was not verified since its files were written",
                hint=f"run upcycle verify {folder}; or publish it with --force, and its card will say so",
            )
        return "It was published without being verified."
    if verification.get("verdict") not in ("exact", "approximate"):
        why = verification.get("explanation", "no verdict")
        if not force:
            raise VerificationError(
                f"{folder} is broken: {why}", hint="convert again; or publish it with --force, and its card will say so"
            )
        return f"Its verification failed: {why}."
    return None


def _upload(folder: Path, name: str, digest: str) -> Upload:
    path = folder / name
    if name.endswith(_WEIGHTS):
        return Upload(name, path.stat().st_size, digest, path)
    upload = Upload.of(name, path.read_bytes())
    if upload.sha256 != digest:
        raise CheckpointError(
            f"{path} was changed while it was read", hint="run upcycle verify, then the same command again"
        )
    return upload
