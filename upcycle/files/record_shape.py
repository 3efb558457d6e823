"""Checks the form of ``upcycle.json``, which may come with a downloaded folder and is no more trusted than its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.errors import CheckpointError
from upcycle.files.formats.settings import MAPPING, NAME, NAMES, ValueKind, check_value

_HASHES = ValueKind(
    "a mapping of file names to SHA-256 hashes",
    lambda v: isinstance(v, Mapping) and all(isinstance(k, str) and isinstance(h, str) for k, h in v.items()),
)
_SOURCES = ValueKind(
    "a list of mappings with a name",
    lambda v: isinstance(v, list) and all(isinstance(s, Mapping) and isinstance(s.get("name"), str) for s in v),
)
_VERSIONS = ValueKind(
    "a mapping of packages to versions",
    lambda v: isinstance(v, Mapping) and all(isinstance(version, str) for version in v.values()),
)
# Key -> what its value must be; a dot leads into a mapping. Keys that are not listed are only shown to users.
_REQUIRED: Mapping[str, ValueKind] = {
    "versions": _VERSIONS,
    "versions.upcycle": NAME,
    "versions.transformers": NAME,
    "source": MAPPING,
    "source.name": NAME,
    "source.family": NAME,
    "source.fingerprint": NAME,
    "method": MAPPING.optional,
    "method.name": NAME,
    "method.title": NAME,
    "plan": MAPPING,
    "plan.kind": NAME,
    "plan.target": NAME,
    "plan.promise": NAME,
    "plan.promise_reason": NAME,
    "plan.warnings": NAMES,
    "files": _HASHES,
}
_OPTIONAL: Mapping[str, ValueKind] = {
    "source.revision": NAME.optional,
    "sources": _SOURCES.optional,
    "router": MAPPING.optional,
    "calibration": MAPPING.optional,
    "merging": MAPPING.optional,
    "training": MAPPING.optional,
    "adapters": _SOURCES.optional,
}


def check_record(record: Mapping[str, Any], path: Path) -> None:
    """Refuse an ``upcycle.json`` that no conversion wrote.

    Raises:
        CheckpointError: a key is missing, or its value is of another kind; the message names file and key.
    """
    for key, kind in {**_REQUIRED, **_OPTIONAL}.items():
        outer, _, inner = key.partition(".")
        holder: Any = record.get(outer) if inner else record
        name = inner or outer
        if not isinstance(holder, Mapping):
            continue  # an optional mapping that is null
        if name in holder:
            check_value(key, holder[name], kind, str(path), "copy the folder again, or convert again")
        elif key in _REQUIRED:
            raise CheckpointError(f"{path}: key '{key}' is missing", hint="copy the folder again, or convert again")
