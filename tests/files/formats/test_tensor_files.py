"""The safetensors reader against the library's own writer, and against damage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.tensor_files import INDEX, SINGLE, SafetensorsFile, SafetensorsFolder

TENSORS = {
    "a": torch.randn(5, 3),
    "b": torch.randn(7, 2).bfloat16(),
    "c": torch.arange(6).view(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    return tmp_path / SINGLE


def test_reads_what_the_library_wrote(file: Path) -> None:
    opened = SafetensorsFile(file)
    assert opened.specs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = opened.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("most_bytes", [1, 12, 25, 10**6])
def test_chunks_join_to_the_whole(file: Path, most_bytes: int) -> None:
    chunks = list(SafetensorsFile(file).chunks("a", most_bytes))
    assert all(chunk.numel() * 4 <= max(most_bytes, 12) for chunk in chunks)
    assert torch.equal(torch.cat(chunks), TENSORS["a"])


def test_truncation_anywhere_is_found(file: Path) -> None:
    content = file.read_bytes()
    for length in (0, 4, 8, 50, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            SafetensorsFile(file)


def test_no_bit_of_the_header_can_flip_into_a_crash(file: Path) -> None:
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for position in range(header):
        for bit in (0, 3, 6):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            try:
                SafetensorsFile(file)
            except (CheckpointError, RefusalError):
                refused += 1
    # What is accepted changed a name or the free-form metadata; the family's check catches names.
    assert refused > 0.6 * 3 * header


def test_unknown_dtype_names_the_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e5m2)}, tmp_path / SINGLE)
    with pytest.raises(RefusalError, match=r"quantized.*'w' has dtype F8_E5M2"):
        SafetensorsFile(tmp_path / SINGLE)


def sharded(folder: Path) -> dict[str, str]:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "two.safetensors"}


def test_reads_shards_by_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": sharded(tmp_path)}))
    folder = SafetensorsFolder(tmp_path)
    assert torch.equal(folder.read("b"), TENSORS["b"])
    assert folder.location("b").endswith("two.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors, which is missing"),
        ({"a": "../secret.safetensors"}, "points outside its folder"),
        ({"a": "/etc/passwd"}, "points outside its folder"),
        ({"a": ".."}, "points outside its folder"),
        ({"a": 3}, "must map tensor names to file names"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": sharded(tmp_path) | change}))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_an_index_need_not_list_what_its_shards_hold_nor_hold_what_it_lists(tmp_path: Path) -> None:
    """As for stock loaders: of an index only the names of the files count."""
    sharded(tmp_path)
    save_file({"a": TENSORS["a"], "extra": TENSORS["c"]}, tmp_path / "one.safetensors")
    mapping = {"a": "one.safetensors", "b": "two.safetensors", "gone": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": mapping}))
    assert SafetensorsFolder(tmp_path).specs.keys() == {"a", "b", "extra"}


@pytest.mark.parametrize("shards", ["missing", "equal", "unlike", "fewer"])
def test_an_index_beside_a_single_file_must_lead_to_the_same_weights(tmp_path: Path, shards: str) -> None:
    mapping = sharded(tmp_path)
    single = {"a": TENSORS["a"], "b": TENSORS["b"].clone()}
    if shards == "unlike":
        single["b"][3, 1] += 1
    elif shards == "fewer":
        single["c"] = TENSORS["c"]
    elif shards == "missing":
        for name in set(mapping.values()):
            (tmp_path / name).unlink()
    save_file(single, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": mapping}))
    if shards in ("unlike", "fewer"):
        with pytest.raises(CheckpointError, match=f"they differ in tensor '{'b' if shards == 'unlike' else 'c'}'"):
            SafetensorsFolder(tmp_path)
    else:
        assert [file.path.name for file in SafetensorsFolder(tmp_path).files] == [SINGLE]


def header(path: Path, content: bytes, data: int = 0) -> Path:
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(data))
    return path


@pytest.mark.parametrize(
    "content",
    [
        b'{"w":{"dtype":"F32","shape":[' + b",".join([b"9223372036854775807"] * 200_000) + b'],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 4_000_000 + b'],"data_offsets":[0,4]}}',
        b'{"w":' + b"[" * 2_000_000,
        b'{"w":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
        b'{"w":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":["0",4]}}',
        b'{"w":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}',
        b'{"w":7}',
        b"[]",
        b"{}",
    ],
    ids=[
        "dimensions",
        "digits",
        "nested",
        "float",
        "bool",
        "negative",
        "list",
        "text",
        "shape",
        "entry",
        "array",
        "none",
    ],
)
def test_a_header_that_no_writer_made_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        SafetensorsFile(header(tmp_path / SINGLE, content, data=4))
    assert time.monotonic() - started < 5  # safetensors itself needs milliseconds; products of a long shape took 40 s
    assert len(caught.value.message) < 500


def test_fingerprint_changes_with_the_checkpoint(file: Path) -> None:
    before = SafetensorsFolder(file.parent).fingerprint
    save_file(TENSORS | {"a": torch.zeros(6, 3)}, file)
    assert SafetensorsFolder(file.parent).fingerprint != before


def test_a_sample_tells_versions_of_one_shape_apart(file: Path) -> None:
    opened = SafetensorsFolder(file.parent)
    before = opened.sample()
    assert before == SafetensorsFolder(file.parent).sample()
    for name in ("a", "b", "c", "scalar"):
        save_file({**TENSORS, name: TENSORS[name] + 1}, file, metadata={"format": "pt"})
        assert opened.sample() != before, name
    assert opened.fingerprint == SafetensorsFolder(file.parent).fingerprint  # the headers are the same
