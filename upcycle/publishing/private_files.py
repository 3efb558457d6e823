"""Looks through everything that would be published for what is private: keys, and what tells of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import parse_json, parse_yaml
from upcycle.files.private_text import Finding, Machine, machine_in, path_in_value, secrets_in, this_machine

if TYPE_CHECKING:
    from upcycle.publishing.upload import Upload

# Pieces of words in their thousands, in which any short name is found. Keys and this machine's folders still are not.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
_SHOWN = 5
_MOST_HEADER = 100_000_000  # bytes; safetensors' own limit


def check_private(files: Iterable[Upload], allowed: Iterable[str] = (), owner: str = "") -> int:
    """Refuse to publish what is private.

    Args:
        files: all that would be sent.
        allowed: texts that may be published although they tell of this machine. Keys never may.
        owner: under whose name it is published: that is no secret.

    Returns:
        How many files were looked through.

    Raises:
        UsageError: something is; it says in which file, which line and which key.
    """
    machine, may = this_machine(), {*allowed, owner}
    count = 0
    found: list[tuple[str, str, Finding]] = []
    for file in files:
        count += 1
        places = _findings(file, machine)
        found += [(file.name, place, one) for place, one in places if one.secret or not _is_among(one.text, may)]
    if not found:
        return count
    lines = list(dict.fromkeys(f"{name}{place}: {finding.what}, {finding.shown}" for name, place, finding in found))
    more = f"\nand {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    hint = "take it out and convert again (verify, evaluate, report and card write theirs anew)"
    if not any(finding.secret for _, _, finding in found):
        hint += f"; or --allow {json.dumps(found[0][2].text)} publishes it, where everybody may know it"
    raise UsageError("what is private would be published:\n" + "\n".join(lines[:_SHOWN]) + more, hint=hint)


def _is_among(text: str, allowed: Iterable[str]) -> bool:
    """Whether it is one of them, or lies in it."""
    return any(each and (text == each or text.startswith(each.rstrip("/") + "/")) for each in allowed)


def _findings(file: Upload, machine: Machine) -> Iterator[tuple[str, Finding]]:
    """What is found in one file, and where."""
    if isinstance(file.content, Path):
        header = _header(file.content)
        for value in (file.name, *header):
            yield from (("'s header", finding) for finding in _in_value(value, machine))
        return
    text = file.content.decode("utf-8", errors="replace")
    if file.name in _VOCABULARIES:
        narrow = Machine(machine.homes, (), ())
        found = [*secrets_in(text), *(each for each in machine_in(text, narrow) if each.what == "the home folder")]
        yield from ((_line(text, finding.text), finding) for finding in found)
        return
    content = _parsed(file.name, text)
    if content is None:
        found = [*secrets_in(text), *machine_in(text, machine)]
        yield from ((_line(text, finding.text), finding) for finding in found)
        return
    seen = set()
    for key, value in _values(content):
        for finding in _in_value(value, machine):
            seen.add(finding.text)
            yield f"{_line(text, finding.text)}{f' ({key})' if key else ''}", finding
    for finding in (*secrets_in(text), *machine_in(text, machine)):  # comments
        if finding.text not in seen:
            yield _line(text, finding.text), finding


def _in_value(value: str, machine: Machine) -> Iterator[Finding]:
    path = path_in_value(value)
    yield from secrets_in(value)
    found = list(machine_in(value, machine))
    yield from found or ([path] if path else [])


def _parsed(name: str, text: str) -> Any:
    """What a record holds; None where it is none, or cannot be read as one."""
    try:
        if name.endswith(".json"):
            return parse_json(text.encode(), name)
        return parse_yaml(text, name) if name.endswith((".yaml", ".yml")) else None
    except CheckpointError:
        return None


def _values(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string, keys too, and under which key it stands."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for name, value in content.items():
            inner = f"{key}.{name}" if key else str(name)
            yield inner, str(name)
            yield from _values(value, inner)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _values(value, f"{key}.{number}")


def _line(text: str, part: str) -> str:
    """In which line of a file something stands; nothing where it is written there in another way."""
    for written in (part, json.dumps(part)[1:-1]):
        if (start := text.find(written)) >= 0:
            return f", line {text.count(chr(10), 0, start) + 1}"
    return ""


def _header(path: Path) -> list[str]:
    """The words in a file of weights: names of tensors, and what is said about them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, _MOST_HEADER))
    content = parse_json(text, str(path))
    found = []
    for _, value in _values(content):
        try:
            inner = parse_json(value.encode(), str(path)) if value.startswith("{") else None
        except CheckpointError:
            inner = None
        found += [text for _, text in _values(inner)] if inner else [value]
    return found
