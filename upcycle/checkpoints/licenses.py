"""Finds the licence of a source in its model card, ``.gguf`` file or licence file, and the common licence of several sources.

Ids are the hub's (https://huggingface.co/docs/hub/repositories-licenses).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.license_ids import LICENSE_IDS, OTHER
from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.gguf_file import GgufFile
from upcycle.files.formats.parsing import parse_yaml
from upcycle.formatting import is_web_address

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint

_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FILES = ("LICENSE*", "LICENCE*")
_READ = 4096  # characters at the beginning of a licence file that are read
# Licence id -> pattern that the beginning of a licence file must contain.
_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge, to any person obtaining a copy",
    "llama2": r"LLAMA 2 COMMUNITY LICENSE",
    "llama3": r"META LLAMA 3 COMMUNITY LICENSE",
    "llama3.1": r"LLAMA 3\.1 COMMUNITY LICENSE",
    "llama3.2": r"LLAMA 3\.2 COMMUNITY LICENSE",
    "llama3.3": r"LLAMA 3\.3 COMMUNITY LICENSE",
    "gemma": r"Gemma Terms of Use",
}
HINT = "read the licences, decide under which terms the result may be published, and name them with --license ID"


@dataclass(frozen=True)
class License:
    """Holds the hub's id of a licence and, for ``other``, a name and a link or file name."""

    id: str
    name: str | None = None
    link: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """Return the licence as ``upcycle.json`` keeps it."""
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> License | None:
        """Return the licence that :meth:`as_dict` described; None for None."""
        return _of_keys(found, "id", "name", "link") if isinstance(found, Mapping) else None

    @classmethod
    def of_card(cls, found: Mapping[str, Any]) -> License | None:
        """Return the licence in the metadata of a model card, or None."""
        return _of_keys(found, "license", "license_name", "license_link")

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id


def chosen_license(id: str | None, name: str | None = None, link: str | None = None) -> License | None:
    """Return the licence that a user named: an id of the hub, or ``other`` with a name and a link. None where ``id`` is None.

    Raises:
        UsageError: the hub does not know the id, or name and link are missing, superfluous or malformed.
    """
    if id is None:
        if name or link:
            raise UsageError("--license-name and --license-link need --license other", hint="add --license other")
        return None
    known = id.strip().lower()
    if known not in LICENSE_IDS:
        hint = "for a licence that it does not know: --license other --license-name NAME --license-link https://..."
        raise UsageError(
            f"--license {id!r} is not a licence that the hub knows", hint=license_suggestion(known, LICENSE_IDS, hint)
        )
    if known != OTHER and (name or link):
        raise UsageError(
            f"--license {known} takes no name and no link: its text is known",
            hint="leave --license-name and --license-link out",
        )
    if known == OTHER and not (name and name.strip() and link):
        raise UsageError(
            "--license other needs a name and a link", hint="add --license-name NAME and --license-link https://..."
        )
    if link and not _is_link(link):
        raise UsageError(
            f"--license-link {link!r} is not an address",
            hint="give https://..., or the name of a file such as LICENSE",
        )
    return License(known, name.strip() if name else None, link)


def license_suggestion(found: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint with the known names most like ``found``, if any, followed by ``otherwise``."""
    near = get_close_matches(found, sorted(known), n=3)
    return f"did you mean {' or '.join(near)}? {otherwise}" if near else otherwise


def _is_link(link: str) -> bool:
    """Return whether ``link`` is a web address, or the name of a file beside the card."""
    return bool(is_web_address(link) or re.fullmatch(r"[\w][\w. -]*", link))


def front_matter(text: str) -> dict[str, Any]:
    """Return the YAML at the head of a model card; empty where there is none that can be parsed."""
    match = _FRONT_MATTER.match(text)
    try:
        found = parse_yaml(match[1], "the model card") if match else None
    except CheckpointError:
        return {}
    return found if isinstance(found, dict) else {}


def license_of(checkpoint: Checkpoint) -> License | None:
    """Return the licence of a checkpoint, or None where no file of it names one."""
    if isinstance(checkpoint.store, GgufFile):
        keys = "general.license", "general.license.name", "general.license.link"
        return _of_keys({key: checkpoint.store.metadata(key) for key in keys}, *keys)
    own, adapter = _of_folder(checkpoint.source.path), checkpoint.source.adapter
    added = _of_folder(adapter) if adapter else None
    if added is None or own is None or added == own:
        return own or added
    return License(OTHER, f"{own} and {added}")


def license_record(checkpoint: Checkpoint) -> dict[str, str | None] | None:
    """Return the licence of a checkpoint as ``upcycle.json`` keeps it, or None."""
    found = license_of(checkpoint)
    return found.as_dict() if found else None


def _of_folder(path: Path) -> License | None:
    card = path / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        if found := License.of_card(front_matter(text)):
            return found
    for pattern in _FILES:
        for file in sorted(path.glob(pattern)):
            if file.is_file():
                return _of_text(file)
    return None


def common_license(found: Mapping[str, License | None]) -> License | None:
    """Return the licence that all sources have; None where no source names one.

    Args:
        found: source name -> licence.

    Raises:
        UsageError: the licences differ, or only some are known. A person must then decide which terms the result may have.
    """
    if len({license and (license.id, license.name) for license in found.values()}) > 1:
        listed = ", ".join(f"{name}: {license or 'unknown'}" for name, license in found.items())
        raise UsageError(f"the sources' licences differ ({listed})", hint=HINT)
    return next(iter(found.values()), None)


def _of_keys(content: Mapping[str, Any], id_key: str, name_key: str, link_key: str) -> License | None:
    identifier, name, link = (content.get(key) for key in (id_key, name_key, link_key))
    if isinstance(identifier, list) and len(identifier) == 1:
        identifier = identifier[0]
    if isinstance(identifier, list) and identifier:
        return License("other", name=" and ".join(map(str, identifier)))
    if not isinstance(identifier, str) or not identifier.strip():
        return None
    name = name.strip() if isinstance(name, str) and name.strip() else None
    link = link if isinstance(link, str) and _is_link(link) else None
    known = identifier.strip().lower()
    # The hub refuses a card whose licence id it does not know.
    return License(known, name, link) if known in LICENSE_IDS else License(OTHER, name or identifier.strip(), link)


def _of_text(file: Path) -> License:
    with file.open(encoding="utf-8", errors="replace") as opened:
        text = opened.read(_READ)
    known = [name for name, pattern in _TEXTS.items() if re.search(pattern, text, re.IGNORECASE)]
    if len(known) == 1 and "commons clause" not in text.lower():
        return License(known[0])
    return License("other", name="see-file", link=file.name)
