"""The safetensors reader against the library's own writer, and against damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from upcycle.errors import CheckpointError
from upcycle.tensor_files import INDEX, SINGLE, SafetensorsFile, SafetensorsFolder

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
            except CheckpointError:
                refused += 1
    # What is accepted changed a name or the free-form metadata; the family's check catches names.
    assert refused > 0.6 * 3 * header


def test_unknown_dtype_names_the_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="'w' has dtype F8_E4M3"):
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
        ({"c": "one.safetensors"}, "'c' is in one.safetensors, which does not hold it"),
        ({"a": 3}, "must map tensor names to file names"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": sharded(tmp_path) | change}))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFolder(tmp_path)


def test_a_tensor_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": TENSORS["a"], "extra": TENSORS["c"]}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match="does not list tensor 'extra'"):
        SafetensorsFolder(tmp_path)


def test_fingerprint_changes_with_the_checkpoint(file: Path) -> None:
    before = SafetensorsFolder(file.parent).fingerprint
    save_file(TENSORS | {"a": torch.zeros(6, 3)}, file)
    assert SafetensorsFolder(file.parent).fingerprint != before
