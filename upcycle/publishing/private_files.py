"""Searches everything that would be published for private text: keys, and names and folders of this machine."""

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

# Vocabularies contain any short name by chance, so they are searched only for keys and for the home folder.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
_MOST_LISTED = 5
_MOST_HEADER = 100_000_000  # bytes; safetensors' own limit


def check_private(files: Iterable[Upload], allowed: Iterable[str] = (), owner: str = "") -> int:
    """Refuse to publish private text.

    Args:
        files: all files that would be sent.
        allowed: texts that may be published although they are private to this machine. Keys are never allowed.
        owner: the owner of the repository, whose name may be published.

    Returns:
        The number of files that were searched.

    Raises:
        UsageError: there is private text; the message names file, line and key.
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
    more = f"\nand {len(lines) - _MOST_LISTED} more" if len(lines) > _MOST_LISTED else ""
    hint = "remove it and convert again (verify, evaluate, report and card write their own files again)"
    if not any(finding.secret for _, _, finding in found):
        hint += f"; if everybody may know it, publish it with --allow {json.dumps(found[0][2].text)}"
    raise UsageError("private text would be published:\n" + "\n".join(lines[:_MOST_LISTED]) + more, hint=hint)


def _is_among(text: str, allowed: Iterable[str]) -> bool:
    """Return whether a text is one of the allowed ones, or a path in one of them."""
    return any(each and (text == each or text.startswith(each.rstrip("/") + "/")) for each in allowed)


def _findings(file: Upload, machine: Machine) -> Iterator[tuple[str, Finding]]:
    """Yield the findings in one file, with their places."""
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
    for finding in (*secrets_in(text), *machine_in(text, machine)):  # in comments, which are not among the values
        if finding.text not in seen:
            yield _line(text, finding.text), finding


def _in_value(value: str, machine: Machine) -> Iterator[Finding]:
    path = path_in_value(value)
    yield from secrets_in(value)
    found = list(machine_in(value, machine))
    yield from found or ([path] if path else [])


def _parsed(name: str, text: str) -> Any:
    """Return the content of a JSON or YAML file; None where it is another file or cannot be parsed."""
    try:
        if name.endswith(".json"):
            return parse_json(text.encode(), name)
        return parse_yaml(text, name) if name.endswith((".yaml", ".yml")) else None
    except CheckpointError:
        return None


def _values(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string, including keys, with the key that it is under."""
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
    """Return the line of a text that contains ``part``, for messages; empty where the text has it in another form."""
    for written in (part, json.dumps(part)[1:-1]):
        if (start := text.find(written)) >= 0:
            return f", line {text.count(chr(10), 0, start) + 1}"
    return ""


def _header(path: Path) -> list[str]:
    """Return the strings in the header of a safetensors file: names of tensors, and metadata."""
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
