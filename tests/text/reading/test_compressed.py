"""Compressed files are read as what is in them, and damage is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from upcycle.errors import UsageError
from upcycle.text.reading.columns import Reading
from upcycle.trainers.data.corpus import LocalCorpus

pyarrow = pytest.importorskip("pyarrow")

TEXTS = [f"Größe {number} " + "x" * (number % 50) for number in range(300)]


def packed(path: Path, content: bytes) -> Path:
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(content))
    else:
        half = len(content) // 2  # of two frames, as parallel compressors write
        path.write_bytes(
            b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))
        )
    return path


def read(path: Path, size: int = 10**6, **reading: str) -> list[str]:
    corpus = LocalCorpus([str(path)], Reading(**reading), size)  # type: ignore[arg-type]
    return [str(text) for shard in range(corpus.shards or 0) for text in corpus.documents(shard)]


@pytest.mark.parametrize("ending", [".gz", ".ZST"])
def test_what_is_inside_is_read(tmp_path: Path, ending: str) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    assert read(packed(tmp_path / f"a.jsonl{ending}", lines)) == TEXTS
    rows = json.dumps([{"text": text} for text in TEXTS]).encode()
    assert read(packed(tmp_path / f"a.json{ending}", rows)) == TEXTS
    table = "text\n" + "".join(text + "\n" for text in TEXTS)
    assert read(packed(tmp_path / f"a.csv{ending}", table.encode())) == TEXTS
    plain = "\n".join(TEXTS)
    path = packed(tmp_path / f"a.txt{ending}", plain.encode())
    assert read(path, separator="\n") == TEXTS
    parts = read(path, size=500)  # cut at the ends of lines, as text that is not compressed is
    assert "".join(parts) == plain
    assert 10 < len(parts) < 30
    assert all(part.endswith("\n") for part in parts[:-1])


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_broken_line_and_a_broken_file_are_found_by_the_check(tmp_path: Path, ending: str) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    path = packed(tmp_path / f"a.jsonl{ending}", "\n".join([*lines, "{", "{}"]).encode())
    with pytest.raises(UsageError, match="line 301 is not JSON"):
        LocalCorpus([str(path)], Reading(), 1000).check(tmp_path / "cache")
    whole = packed(tmp_path / f"b.jsonl{ending}", "\n".join(lines * 20).encode())
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"b\.jsonl\.(gz|zst) is damaged or cut off"):
        LocalCorpus([str(whole)], Reading(), 1000).check(tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_table_is_found_by_the_check(tmp_path: Path, name: str) -> None:
    from pyarrow import ipc, parquet

    table, path = pyarrow.table({"text": TEXTS}), tmp_path / name
    if name == "a.parquet":
        parquet.write_table(table, path, row_group_size=50, compression="gzip")
    else:
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    good = LocalCorpus([str(path)], Reading(), 2000)
    assert good.check(tmp_path / "cache").documents == 300
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.(parquet|arrow) is damaged"):
        LocalCorpus([str(path)], Reading(), 2000).check(tmp_path / "cache")
