"""Parses all JSON and YAML from outside, within bounds of size, depth and digits and without references, and names every fault.

A file of a few kilobytes can cost a parser hours or gigabytes: by nesting that exhausts the stack, integers of a million digits, or
YAML aliases that double at every level (https://en.wikipedia.org/wiki/Billion_laughs_attack). Text of other people is therefore
parsed only here. The result is plain data of bounded depth: no dates, no NaN unless it is asked for, and no half characters (lone
surrogates), which no UTF-8 file can hold.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from upcycle.errors import CheckpointError, UpcycleError

MOST_JSON_BYTES = 64 << 20  # five times the largest index of a published checkpoint
MOST_YAML_BYTES = 1 << 20
DEEPEST = 64  # levels of lists and mappings; files of upcycle and transformers have at most 8
MOST_DIGITS = 400  # digits of one number; every fp64 has fewer before its point

_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
# Text that may be read as infinity or NaN: 1e999, a long row of digits, YAML's .inf and .nan.
_BEYOND = re.compile(r"\d\.?[eE]\+?\d{3}|\d{309}|\.(?:inf|nan)\b", re.IGNORECASE)
_LONG_NUMBER = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")
_STANDARD_TAG = "tag:yaml.org,2002:"
_PYTHON_TAG = _STANDARD_TAG + "python/"

ErrorKind = type[UpcycleError]


def parse_json(
    text: str | bytes,
    where: str,
    *,
    error: ErrorKind = CheckpointError,
    most_bytes: int = MOST_JSON_BYTES,
    nan: bool = False,
    halves: bool = False,
) -> Any:
    """Parse one JSON document.

    Args:
        text: the document; bytes must be UTF-8.
        where: how messages call the document: a file, or a file and a line.
        error: the class of the error to raise.
        most_bytes: the length of the longest document that is read.
        nan: allow ``NaN`` and ``Infinity``, which JSON does not have but Python writes.
        halves: replace half characters by U+FFFD instead of refusing them.

    Raises:
        UpcycleError: of the class ``error``; the message says where the fault is and what was found.
    """
    if len(text) > most_bytes:
        raise error(f"{where} is too large: {len(text)} bytes or more, and at most {most_bytes} are read")
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as fault:
        raise error(f"{where} is not UTF-8 text: byte {fault.start} is {fault.object[fault.start]:#04x}") from None
    try:
        found = json.loads(decoded, parse_constant=None if nan else _no_constant, parse_int=_integer)
    except RecursionError:
        raise error(f"{where} is nested deeper than {DEEPEST} levels") from None
    except json.JSONDecodeError as fault:
        line = f"line {fault.lineno}, " if "\n" in decoded.strip() else ""
        raise error(f"{where} is not JSON: {fault.msg} at {line}column {fault.colno}") from None
    except ValueError as fault:  # raised by _no_constant, _integer or float()
        raise error(f"{where} is not JSON: {fault}") from None
    # A document is at most as deep as it has opening brackets, so most need no walk.
    if decoded.count("[") + decoded.count("{") > DEEPEST and _depth_exceeds(found, DEEPEST):
        raise error(f"{where} is nested deeper than {DEEPEST} levels")
    # Only an escape or a str can hold half characters, as decoding refuses them; looking for them takes longer than parsing.
    escaped = "\\ud" in decoded or "\\uD" in decoded
    if (escaped and _HALF_ESCAPE.search(decoded)) or (isinstance(text, str) and _HALF.search(decoded)):
        found = _without_halves(found, where, error, halves)
    if not nan and _BEYOND.search(decoded):
        _refuse_infinite(found, where, error)
    return found


def read_json(path: Path, *, error: ErrorKind = CheckpointError, nan: bool = False) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        UpcycleError: of the class ``error``; the file is missing, unreadable, out of bounds or not a JSON object.
    """
    found = parse_json(_content(path, MOST_JSON_BYTES, error, "JSON"), str(path), error=error, nan=nan)
    if not isinstance(found, dict):
        raise error(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def parse_yaml(text: str, where: str, *, error: ErrorKind = CheckpointError, most_bytes: int = MOST_YAML_BYTES) -> Any:
    """Parse one YAML document of plain data. Dates stay text.

    Args:
        text: the document.
        where: how messages call the document.
        error: the class of the error to raise.
        most_bytes: the length of the longest document that is read.

    Raises:
        UpcycleError: of the class ``error``; the document is not YAML, has a tag that is not plain data or an alias, or its
            nesting, a number or its size is out of bounds. The message says where.
    """
    if len(text) > most_bytes:
        raise error(f"{where} is too large: {len(text)} characters, and at most {most_bytes} are read")
    try:
        _check_events(text, where, error)
        found = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as fault:
        raise error(f"{where} is not YAML: {' '.join(str(fault).split())}") from None
    # PyYAML's constructors raise these unwrapped.
    except (ValueError, RecursionError, TypeError, AttributeError) as fault:
        raise error(f"{where} is not YAML: {fault}") from None
    if _HALF_ESCAPE.search(text):
        _without_halves(found, where, error, replace=False)
    if _BEYOND.search(text):
        _refuse_infinite(found, where, error)
    return found


def read_yaml(path: Path, *, error: ErrorKind = CheckpointError) -> Any:
    """Return the plain data that a YAML file holds.

    Raises:
        UpcycleError: of the class ``error``; the file is missing or unreadable, or :func:`parse_yaml` refuses it.
    """
    content = _content(path, MOST_YAML_BYTES, error, "YAML")
    try:
        return parse_yaml(content.decode("utf-8"), str(path), error=error)
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text: byte {fault.start} is {content[fault.start]:#04x}") from None


def read_lines(path: Path) -> list[Any]:
    """Return the JSON documents on a log's lines, up to the first line that is not JSON, which a kill has cut off."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(parse_json(line, "a line", nan=True, halves=True))
        except CheckpointError:
            break
    return found


def dump_yaml(content: Any) -> str:
    """Return plain data as YAML that :func:`parse_yaml` reads: keys in their order, and without aliases."""
    text: str = yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text


def whole_characters(text: str) -> str:
    """Return a text with U+FFFD in place of every half character, so that tokenizers and UTF-8 files can hold it."""
    if not _HALF.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _content(path: Path, most_bytes: int, error: ErrorKind, kind: str) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe could wait for ever
            raise error(f"{path} is not readable {kind}: it is no regular file")
        with path.open("rb") as file:
            return file.read(most_bytes + 1)
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as fault:
        raise error(f"{path} is not readable {kind}: {fault.strerror}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, and at most {MOST_DIGITS} are read")
    return int(digits)


def _refuse_infinite(found: Any, where: str, error: ErrorKind) -> None:
    for place, value in _leaves(found):
        if isinstance(value, float) and not math.isfinite(value):
            raise error(f"{where}: {place} is no finite fp64 number")


def _depth_exceeds(found: Any, most: int) -> bool:
    level = [found]
    for _ in range(most + 1):
        level = [value for each in level for value in _values(each)]
        if not level:
            return False
    return True


def _values(found: Any) -> list[Any]:
    if isinstance(found, dict):
        return [value for value in found.values() if isinstance(value, (dict, list))] or [None]
    return ([value for value in found if isinstance(value, (dict, list))] or [None]) if isinstance(found, list) else []


def _leaves(found: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key and every value that is neither list nor mapping, with its place; never deeper than :data:`DEEPEST`."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield f"a key of '{place}'" if place else "a key", key
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(found, list):
        for index, value in enumerate(found):
            yield from _leaves(value, f"{place}[{index}]")
    else:
        yield f"'{place}'" if place else "the value", found


def _without_halves(found: Any, where: str, error: ErrorKind, replace: bool) -> Any:
    if not replace:
        for place, value in _leaves(found):
            if isinstance(value, str) and _HALF.search(value):
                printable = place.encode("utf-8", "backslashreplace").decode()
                raise error(
                    f"{where}: {printable} holds half a character (a lone surrogate), which is no text",
                    hint="write the whole character, or leave it out",
                )
        return found
    if isinstance(found, dict):
        return {
            whole_characters(key) if isinstance(key, str) else key: _without_halves(value, where, error, replace)
            for key, value in found.items()
        }
    if isinstance(found, list):
        return [_without_halves(value, where, error, replace) for value in found]
    return whole_characters(found) if isinstance(found, str) else found


def _check_events(text: str, where: str, error: ErrorKind) -> None:
    """Refuse, before anything is constructed, what would be costly or dangerous to construct."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise error(
                f"{where}, line {line}: YAML aliases (*{event.anchor}) are not read", hint="write the value out"
            )
        tag = getattr(event, "tag", None)
        if tag and (not tag.startswith(_STANDARD_TAG) or tag.startswith(_PYTHON_TAG)):
            raise error(f"{where}, line {line}: {tag} runs code, and only plain data is read", hint="leave the tag out")
        if isinstance(event, yaml.ScalarEvent) and event.style is None and _LONG_NUMBER.search(event.value):
            raise error(f"{where}, line {line}: a number has more than {MOST_DIGITS} digits", hint="put text in quotes")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise error(f"{where}, line {line}: it is nested deeper than {DEEPEST} levels")


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _PlainLoader(yaml.SafeLoader):
    """Constructs text, numbers, truth values, lists and mappings. Dates stay text: nothing needs one, and some do not exist."""


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _STANDARD_TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _construct_number(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    if len(node.value) > MOST_DIGITS:
        raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
    return getattr(loader, f"construct_yaml_{node.tag.removeprefix(_STANDARD_TAG)}")(node)


def _construct_text(loader: _PlainLoader, node: yaml.Node) -> Hashable:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a date that is no scalar", node.start_mark)
    return str(node.value)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(_STANDARD_TAG + _kind, _construct_number)
_PlainLoader.add_constructor(_STANDARD_TAG + "timestamp", _construct_text)
