"""Files as documents: nothing is lost where they are cut, and what cannot be read is said."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.text.reading.columns import Reading, choose_column
from upcycle.text.reading.documents import find_pieces
from upcycle.text.reading.file_kinds import Format
from upcycle.trainers.data import file_checks
from upcycle.trainers.data.corpus import LocalCorpus

pyarrow = pytest.importorskip("pyarrow")


def read(texts: list[str], size: int, named: Format | None = None, **reading: Any) -> list[str]:
    corpus = LocalCorpus(texts, Reading(**reading), size, named)
    return [text for shard in range(corpus.shards or 0) for text in corpus.documents(shard)]


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
    from upcycle.text.reading.plain_text import read_text

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
    assert choose_column([("x", row), ("y", row)], column) == expected


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
        (no_column, r"x\.jsonl: not every file has a column 'text' or 'content', .*; the columns are body, url"),
        (number_in_column, r"line 2: column 'text' holds int, not text"),
        (a_list, r"x\.jsonl: a row is list, not columns by name"),
        (not_utf8, r"x\.txt is not UTF-8 text: .* byte 3"),
        (not_parquet, r"x\.parquet is not a Parquet file"),
        (compressed, r"x\.jsonl\.gz is damaged or cut off"),
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
    (piece,) = find_pieces([str(tmp_path / name)], 1000, "jsonl" if name == "x.jsonl" else "text")
    (tmp_path / name).unlink()
    with pytest.raises(EnvironmentFault, match="is gone"):
        list(piece.documents(Reading("text")))


ROWS = [{"id": number, "text": f"See {number}, Größe\n{'x' * (number % 5)}"} for number in range(40)]
TEXTS = [row["text"] for row in ROWS]


def lines_of(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "b.ndjson", "c.JSONL", "d.json", "e.json", "f.csv", "g.TSV", "h.parquet", "i.PARQUET"]
)
@pytest.mark.parametrize("size", [200, 10**6])
def test_rows_are_rows_whatever_the_ending(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / name
    if name.lower().endswith("parquet"):
        column = pyarrow.array(TEXTS).dictionary_encode() if name == "i.PARQUET" else TEXTS
        parquet(path, {"id": list(range(40)), "text": column})
    elif name.lower().endswith(("csv", "tsv")):
        table(path, "," if name == "f.csv" else "\t")
    else:
        path.write_text(json.dumps(ROWS, indent=1) if name == "e.json" else lines_of(ROWS))
    assert read([str(path)], size) == TEXTS


def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", lines_of(ROWS)), ("b.txt", "one"), ("c.csv", "text\none\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read([str(tmp_path / "a.jsonl")], 10**6) == TEXTS
    assert read([str(tmp_path / "b.txt"), str(tmp_path / "c.csv")], 10**6) == ["one", "one"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [4, 7, 10**6])
def test_a_separator_matches_either_end_of_line_and_across_cuts(tmp_path: Path, size: int, end: str) -> None:
    (tmp_path / "a.txt").write_bytes(f"{end}---{end}".join(["one", "two", "three"]).encode())
    found = [text.strip() for text in read([str(tmp_path / "a.txt")], size, separator="\n---\n")]
    assert [text for text in found if text] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", lines_of(ROWS).encode(), "named as text, but holds a JSON row on every line"),
        ("a", json.dumps(ROWS).encode(), "named as text, but holds a JSON array"),
        (
            "a.json",
            b'{"one": "object",\n "of": "columns"}',
            "neither a JSON array of rows nor a JSON row on every line",
        ),
        ("a.txt", "text".encode("utf-16"), "text in UTF-16"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "text in UTF-16"),
        ("a.bin", b"abc\0def", "holds zero bytes near byte 3"),
        ("a.JSONL.GZ", b"\x1f\x8b", "is damaged or cut off"),
        ("a.jsonl.bz2", b"BZh", "is compressed in a way that is not read"),
        ("a.pkl", b"x", "is a pickle, not text"),
        ("a.jsonl", b"\n \n", "has no row"),
        ("a.csv", b"id,title\n1,x\n", "a column 'text' or 'content'"),
        ("a.jsonl", b'{"prompt": "a", "response": "b"}', "pairs of 'prompt' and 'response'"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "a chosen and a rejected answer"),
    ],
)
def test_what_is_not_what_it_is_called(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read([str(tmp_path / name)], 10**6)
    assert str(tmp_path / name) in caught.value.message


def test_a_format_says_what_files_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(lines_of(ROWS))
    assert read([str(path)], 10**6, "jsonl") == TEXTS
    assert read([str(path)], 10**6, "text") == [lines_of(ROWS)]


def test_the_column_is_decided_once_for_all_files(tmp_path: Path) -> None:
    """Guessed anew for every piece, an author would be trained on where his first row has no body."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(lines_of([{"body": f"text {number}"} for number in range(50)]))
    second.write_text(lines_of([{"author": f"name {number}"} for number in range(50)]))
    with pytest.raises(
        UsageError, match=r"a\.jsonl: not every file .*the columns are body; in .*b\.jsonl the columns are author"
    ):
        read([str(first), str(second)], 100)
    first.write_text(lines_of([{"body": "one"}, *[{"author": "name"}] * 50]))
    with pytest.raises(UsageError, match=r"line 2: no column 'body'; the columns are author"):
        read([str(first)], 100)


FAULTS = {
    "cut": (b'{"text": "cut off her', "is not JSON"),
    "deep": (b'{"text": "x", "meta": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested deeper than"),
    "latin": (b'{"text": "na\xefve"}', "is not UTF-8 text"),
    "number": (b'{"text": 7}', "column 'text' holds int, not text"),
    "none": (b'{"title": "x"}', "no column 'text'; the columns are title"),
    "list": (b"[1, 2]", "a row is list"),
    "digits": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "5000 digits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_row_far_inside_is_found_before_any_is_needed(tmp_path: Path, fault: str) -> None:
    line, message = FAULTS[fault]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines_of(ROWS).encode().split(b"\n"), line, b'{"text": null}', b'{"text": "end"}']))
    corpus = LocalCorpus([str(path)], Reading(), 300)
    for _ in range(2):  # a fault is not kept: it is looked for again
        with pytest.raises(UsageError, match=message) as caught:
            corpus.check(tmp_path / "cache")
        assert f"{path}, line 41" in caught.value.message
    skipping = LocalCorpus([str(path)], Reading(broken="skip"), 300)
    for _ in range(2):
        found = skipping.check(tmp_path / "cache")
        assert (found.documents, found.empty, found.broken) == (41, 1, 1)
        assert f"{path}, line 41" in found.first[0]
    assert read([str(path)], 300, broken="skip") == [*TEXTS, "", "end"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_read_as_the_sign_for_one_that_is_missing(tmp_path: Path, name: str) -> None:
    row = '{"text": "cut \\ud83d here, whole \\ud83d\\ude00"}'
    (tmp_path / name).write_text(row if name == "a.jsonl" else f"[{row}]")
    assert read([str(tmp_path / name)], 100) == ["cut \ufffd here, whole \U0001f600"]


def test_what_was_looked_at_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of(ROWS))
    corpus = LocalCorpus([str(path)], Reading(), 300)
    first = corpus.check(tmp_path / "cache")
    monkeypatch.setattr(file_checks, "_look", lambda *_: pytest.fail("looked at again"))
    assert corpus.check(tmp_path / "cache") == first
    assert first.documents == 40


def test_a_broken_row_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,one\n2\n3,three\n")
    with pytest.raises(UsageError, match=r"line 3: 1 columns, but the first line names 2"):
        read([str(path)], 10**6)
    assert read([str(path)], 10**6, broken="skip") == ["one", "three"]
    path.write_text('id,text\n1,"never closed\n')
    with pytest.raises(UsageError, match="is not a row of a table"):
        read([str(path)], 10**6)


def test_a_text_file_is_looked_at_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content, message in (
        (b"x" * (3 << 20) + b"\xff", f"near byte {3 << 20}"),
        (b"x" * (1 << 20) + b"\0", "zero bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            LocalCorpus([str(path)], Reading(), 10**6).check(tmp_path / "cache")
    path.write_bytes(("é" * (1 << 20)).encode())  # a character lies across two blocks
    assert LocalCorpus([str(path)], Reading(), 10**6).check(tmp_path / "cache").documents == 1
