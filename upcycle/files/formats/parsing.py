"""The one place that reads JSON and YAML from outside: within bounds of size, depth and digits, without references, and with
every fault named.

A file of a few kilobytes can ask a parser for hours or gigabytes: nesting that exhausts the stack, integers of a million digits,
YAML aliases that double at every level (https://en.wikipedia.org/wiki/Billion_laughs_attack). Text of other people is therefore
parsed here only, and what comes back is plain data of bounded depth: no dates, no NaN where none is asked for, and no half
characters (lone surrogates), which no UTF-8 file can hold.
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

MOST_JSON_BYTES = 64 << 20  # the largest indexes of published checkpoints have a fifth of it
MOST_YAML_BYTES = 1 << 20
DEEPEST = 64  # levels of lists and mappings; what upcycle and transformers write has at most 8
MOST_DIGITS = 400  # of one number: every fp64 has fewer before its point

_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
# What may be read as infinity or NaN: 1e999, a row of digits, YAML's .inf and .nan.
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
        where: what the message calls it: a file, or a file and a line.
        error: class of the error.
        most_bytes: longest document.
        nan: take ``NaN`` and ``Infinity``, which JSON does not have but Python writes.
        halves: put U+FFFD in the place of half characters, instead of refusing them.

    Raises:
        UpcycleError: of the class ``error``; names where, and what was found.
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
    except ValueError as fault:  # of a number
        raise error(f"{where} is not JSON: {fault}") from None
    # Nothing is deeper than it has opening brackets: most documents need no walk.
    if decoded.count("[") + decoded.count("{") > DEEPEST and _depth_exceeds(found, DEEPEST):
        raise error(f"{where} is nested deeper than {DEEPEST} levels")
    # UTF-8 that was decoded holds no half characters; looking for them takes longer than parsing.
    escaped = "\\ud" in decoded or "\\uD" in decoded
    if (escaped and _HALF_ESCAPE.search(decoded)) or (isinstance(text, str) and _HALF.search(decoded)):
        found = _without_halves(found, where, error, halves)
    if not nan and _BEYOND.search(decoded):
        _refuse_infinite(found, where, error)
    return found


def read_json(path: Path, *, error: ErrorKind = CheckpointError, nan: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UpcycleError: of the class ``error``: the file is missing, unreadable, out of bounds or not a JSON object.
    """
    found = parse_json(_content(path, MOST_JSON_BYTES, error, "JSON"), str(path), error=error, nan=nan)
    if not isinstance(found, dict):
        raise error(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def parse_yaml(text: str, where: str, *, error: ErrorKind = CheckpointError, most_bytes: int = MOST_YAML_BYTES) -> Any:
    """Parse one YAML document of plain data. Dates stay text.

    Args:
        text: the document.
        where: what the message calls it.
        error: class of the error.
        most_bytes: longest document.

    Raises:
        UpcycleError: of the class ``error``; names where, the line, and what was found: no YAML, a tag that is not plain data,
            an alias, nesting, a number or a size out of bounds.
    """
    if len(text) > most_bytes:
        raise error(f"{where} is too large: {len(text)} characters, and at most {most_bytes} are read")
    try:
        _check_events(text, where, error)
        found = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as fault:
        raise error(f"{where} is not YAML: {' '.join(str(fault).split())}") from None
    except (
        ValueError,
        RecursionError,
        TypeError,
        AttributeError,
    ) as fault:  # PyYAML's constructors raise them unwrapped
        raise error(f"{where} is not YAML: {fault}") from None
    if _HALF_ESCAPE.search(text):
        _without_halves(found, where, error, replace=False)
    if _BEYOND.search(text):
        _refuse_infinite(found, where, error)
    return found


def read_yaml(path: Path, *, error: ErrorKind = CheckpointError) -> Any:
    """Read a YAML file.

    Raises:
        UpcycleError: of the class ``error``: the file is missing or unreadable, or see :func:`parse_yaml`.
    """
    content = _content(path, MOST_YAML_BYTES, error, "YAML")
    try:
        return parse_yaml(content.decode("utf-8"), str(path), error=error)
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text: byte {fault.start} is {content[fault.start]:#04x}") from None


def read_lines(path: Path) -> list[Any]:
    """The JSON documents of a log's lines, up to the first that is none: the one that a kill cut off."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(parse_json(line, "a line", nan=True, halves=True))
        except CheckpointError:
            break
    return found


def dump_yaml(content: Any) -> str:
    """Plain data as YAML that :func:`parse_yaml` reads: keys in their order, and what occurs twice is written twice."""
    text: str = yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text


def whole_characters(text: str) -> str:
    """The text with U+FFFD in the place of every half of a character: what any tokenizer and any UTF-8 file can take."""
    if not _HALF.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _content(path: Path, most_bytes: int, error: ErrorKind, kind: str) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
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
    """What is neither list nor mapping, keys included, and where it is; never deeper than :data:`DEEPEST`."""
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
                shown = place.encode("utf-8", "backslashreplace").decode()
                raise error(
                    f"{where}: {shown} holds half a character (a lone surrogate), which is no text",
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
    """Refuse by the stream of events what could be dear or dangerous to construct."""
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
    """YAML's text, numbers, truth values, lists and mappings. A date is text: nothing asks for one, and some do not exist."""


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
