"""Records where a converted model came from, in ``upcycle.json``: versions, recipe, source and file hashes.

Nothing in it depends on the clock or the machine, so that the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.licenses import license_record
from upcycle.files.atomic_files import TEMPORARY
from upcycle.files.hashing import hash_file
from upcycle.files.local_names import LocalNames, without_paths
from upcycle.files.records import FILE, RECIPE_FILE, UNHASHED, hash_tokens, versions
from upcycle.planning.cost import Plan
from upcycle.planning.job import PlannedJob
from upcycle.planning.open_sources import sources_record

if TYPE_CHECKING:
    from upcycle.conversion.job import TokensRead


def fingerprint(job: PlannedJob, checkpoint: Checkpoint, blueprint: Path | None, read: TokensRead) -> str:
    """Return a SHA-256 by which an unfinished conversion is recognised as the same job, and resumed.

    It covers the resolved recipe, the source's content, the blueprint that was given, the calibration tokens ``read``, how the
    model writes those that it writes itself, and the versions of upcycle and torch. How the result is verified does not change it.
    """
    recipe = job.recipe.model_dump(exclude={"verification"})
    given = hash_file(blueprint) if blueprint else None
    tokens: list[Any] = [hash_tokens(windows) for windows in read.ids]
    tokens += [asdict(read.own)] if read.own else []
    tokens += [read.images.sha256] if read.images else []
    tokens += read.inputs.sha256 if read.inputs else []
    code = (versions()["upcycle"], versions()["torch"])
    parts = [recipe, checkpoint.fingerprint, checkpoint.version, given, tokens, *code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_record(
    folder: Path,
    job: PlannedJob,
    plan: Plan,
    checkpoint: Checkpoint,
    shard_hashes: dict[str, str],
    calibration: dict[str, Any] | None,
    merging: dict[str, Any] | None = None,
) -> None:
    """Write ``upcycle.json``. Weight files were hashed while they were written; the small files are hashed here."""
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
