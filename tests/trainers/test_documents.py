"""Files as documents: nothing is lost where they are cut, and what cannot be read is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.trainers.documents import find_column, find_pieces

pyarrow = pytest.importorskip("pyarrow")


def read(texts: list[str], size: int, column: str | None = None, separator: str | None = None) -> list[str]:
    return [text for piece in find_pieces(texts, size) for text in piece.documents(column, separator)]


def parquet(path: Path, columns: dict[str, list[Any]], group: int = 3) -> str:
    from pyarrow import parquet as pq

    pq.write_table(pyarrow.table(columns), path, row_group_size=group)
    return str(path)


DOCUMENTS = [f"Größe {number} " + "x" * (number % 7) for number in range(20)]


@pytest.mark.parametrize("size", [1, 13, 64, 10_000])
def test_a_file_in_pieces_has_the_documents_of_the_whole(tmp_path: Path, size: int) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS), encoding="utf-8")
    assert read([str(lines)], size) == DOCUMENTS
    assert read([parquet(tmp_path / "a.parquet", {"n": list(range(20)), "text": DOCUMENTS})], size) == DOCUMENTS
    plain = tmp_path / "a.txt"
    plain.write_text("\n".join(DOCUMENTS), encoding="utf-8")
    assert "".join(read([str(plain)], size)) == plain.read_text(encoding="utf-8")
    assert max(map(len, read([str(plain)], size))) <= size + max(map(len, DOCUMENTS))


def test_a_small_size_makes_many_pieces(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": DOCUMENTS}, group=3)
    assert [(piece.start, piece.stop) for piece in find_pieces([path], 1)] == [(n, n + 1) for n in range(7)]
    assert [(piece.start, piece.stop) for piece in find_pieces([path], 10**6)] == [(0, 7)]


def test_a_separator_divides_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n---\ntwo\n---\nthree")
    assert read([str(path)], 10**6, separator="\n---\n") == ["one", "two", "three"]
    assert read([str(path)], 10**6) == ["one\n---\ntwo\n---\nthree"]


def test_globs_are_sorted_and_a_file_is_there_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")], 100) == ["a", "b", "c[1]"]
    assert read([str(tmp_path / "c[1].txt")], 100) == ["c[1]"]


def test_the_embedded_texts_are_documents() -> None:
    from upcycle.text import read_text

    found = read(["demo"], 100)
    assert len(found) > 100
    assert "\n\n".join(found) == read_text("code") + "\n\n" + read_text("prose")


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"text": "a", "content": "b"}, None, "text"),
        ({"id": 1, "content": "b", "url": "u"}, None, "content"),
        ({"id": 1, "body": "b"}, None, "body"),
        ({"text": "a", "code": "b"}, "code", "code"),
    ],
)
def test_the_column_is_named_or_found(row: dict[str, Any], column: str | None, expected: str) -> None:
    assert find_column(row, column, "x") == expected


def bad_json(folder: Path) -> str:
    (folder / "x.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    return str(folder / "x.jsonl")


def no_column(folder: Path) -> str:
    (folder / "x.jsonl").write_text('{"url": "a", "body": "b"}\n')
    return str(folder / "x.jsonl")


def number_in_column(folder: Path) -> str:
    (folder / "x.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    return str(folder / "x.jsonl")


def a_list(folder: Path) -> str:
    (folder / "x.jsonl").write_text("[1]\n")
    return str(folder / "x.jsonl")


def not_utf8(folder: Path) -> str:
    (folder / "x.txt").write_bytes(b"abc\xff")
    return str(folder / "x.txt")


def not_parquet(folder: Path) -> str:
    (folder / "x.parquet").write_text("no")
    return str(folder / "x.parquet")


def compressed(folder: Path) -> str:
    (folder / "x.jsonl.gz").write_bytes(b"\x1f\x8b")
    return str(folder / "x.jsonl.gz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_json, r"x\.jsonl, line 3 is not JSON"),
        (no_column, r"x\.jsonl, line 1: no column 'text' or 'content', .*; the columns are body, url"),
        (number_in_column, r"line 2: no text in column 'text'"),
        (a_list, r"line 1: no column 'text'"),
        (not_utf8, r"x\.txt is not UTF-8 text: .* byte 3"),
        (not_parquet, r"x\.parquet is not a Parquet file"),
        (compressed, r"x\.jsonl\.gz is compressed"),
        (str, "is a folder"),
        (lambda folder: str(folder / "no-*.txt"), "no such data file"),
        (lambda folder: parquet(folder / "x.parquet", {"n": [1], "m": [2]}), "the columns are m, n"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read([make(tmp_path)], 1000)
    assert str(tmp_path) in caught.value.message


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"text": ["a"], "n": [1]})
    with pytest.raises(UsageError, match="no column 'body'; the columns are n, text"):
        read([path], 1000, column="body")
    with pytest.raises(UsageError, match="column 'n' holds int64, not text"):
        read([path], 1000, column="n")


def test_nulls_are_empty(tmp_path: Path) -> None:
    assert read([parquet(tmp_path / "x.parquet", {"text": ["a", None]})], 1000) == ["a", ""]
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    assert read([str(tmp_path / "x.jsonl")], 1000) == ["a", ""]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_a_file_that_vanishes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a"}\n')
    (piece,) = find_pieces([str(tmp_path / name)], 1000)
    (tmp_path / name).unlink()
    with pytest.raises(EnvironmentFault, match="is gone"):
        list(piece.documents(None, None))
