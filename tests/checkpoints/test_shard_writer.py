"""The streaming writer: what it writes is what the safetensors library would read, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit
from upcycle.checkpoints.shard_writer import Journal, ShardWriter, write_index
from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_spec import TensorSpec

TENSORS = {"a": torch.randn(4, 3), "b": torch.randn(2, 2, 5).bfloat16(), "c": torch.randn(8)}
DTYPE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def shard() -> Shard:
    entries = {n: OutputEntry(n, TensorSpec(tuple(t.shape), DTYPE[t.dtype])) for n, t in TENSORS.items()}
    return Shard(
        "model.safetensors", (Unit("one", None, (entries["a"], entries["b"])), Unit("two", 0, (entries["c"],)))
    )


def write(folder: Path, stop_after: str | None = None) -> str:
    with ShardWriter(folder, shard(), Journal(folder)) as writer:
        for unit in shard().units:
            if unit.name in writer.done:
                continue
            for entry in unit.entries:
                writer.write(entry, TENSORS[entry.name].split(1))
            writer.finish(unit)
            if unit.name == stop_after:
                while writer._waiting:  # or nothing of it might be on disk, and nothing would be continued
                    writer._wait_for_oldest()
                assert unit.name in Journal(folder).digests
                raise KeyboardInterrupt
    return writer.sha256


def test_the_library_reads_it_back(tmp_path: Path) -> None:
    write(tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def test_an_interrupted_file_is_not_finished_and_resumes_byte_equal(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    digest = write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "resumed", stop_after="one")
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    assert write(tmp_path / "resumed") == digest
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage-after", "torn-journal", "no-file"])
def test_a_crash_that_damaged_the_file_is_found_and_redone(tmp_path: Path, damage: str) -> None:
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stop_after="one")
    partial = tmp_path / "model.safetensors.partial"
    content = bytearray(partial.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "cut":
        del content[-5:]
    elif damage == "garbage-after":
        content += b"half a tensor"
    elif damage == "torn-journal":
        (tmp_path / "journal.jsonl").open("a").write('{"unit": "tw')
    partial.write_bytes(content)
    if damage == "no-file":
        partial.unlink()
    write(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_finished_shard_is_not_written_again(tmp_path: Path) -> None:
    digest = write(tmp_path)
    with ShardWriter(tmp_path, shard(), Journal(tmp_path)) as writer:
        assert writer.done == {"one", "two"}
    assert writer.sha256 == digest


def test_too_few_bytes_are_a_fault(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="planned 48"),
        ShardWriter(tmp_path, shard(), Journal(tmp_path)) as writer,
    ):
        writer.write(shard().units[0].entries[0], [TENSORS["a"][:2]])


def test_misaligned_tensors_are_refused_not_written_wrong(tmp_path: Path) -> None:
    odd = OutputEntry("odd", TensorSpec((3,), "bfloat16"))
    wide = OutputEntry("wide", TensorSpec((2,), "float32"))
    with pytest.raises(CheckpointError, match="not be aligned"):
        ShardWriter(tmp_path, Shard("m.safetensors", (Unit("u", None, (odd, wide)),)), Journal(tmp_path))


def test_a_failed_write_is_raised_and_nothing_after_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = ShardWriter._append, [0]

    def failing(self: ShardWriter, data: object, previous: object) -> None:
        calls[0] += 1
        if calls[0] == 3:  # the header, then the second block of the first unit
            raise OSError(28, "No space left on device")
        append(self, data, previous)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "_append", failing)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path)
    assert Journal(tmp_path).digests == {}
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_lie_at_multiples_of_eight_bytes_whatever_their_names(length: int, tmp_path: Path) -> None:
    entry = OutputEntry("n" * length, TensorSpec((2,), "float32"))
    whole = Shard("model.safetensors", (Unit("one", None, (entry,)),))
    with ShardWriter(tmp_path, whole, Journal(tmp_path)) as writer:
        writer.write(entry, [torch.ones(2)])
    content = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    assert len(content) == 8 + header + 8
    assert torch.equal(load_file(tmp_path / "model.safetensors")[entry.name], torch.ones(2))


def test_the_index_of_several_shards_has_every_tensor_and_all_bytes(tmp_path: Path) -> None:
    units = shard().units
    first, second = Shard("a.safetensors", units[:1]), Shard("b.safetensors", units[1:])
    write_index(tmp_path, [first, second])
    content = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert content["weight_map"] == {"a": "a.safetensors", "b": "a.safetensors", "c": "b.safetensors"}
    assert content["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in TENSORS.values())


def test_one_shard_has_an_index_of_its_tensors(tmp_path: Path) -> None:
    write_index(tmp_path, [shard()])
    content = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [entry.name for unit in shard().units for entry in unit.entries]
    assert content["weight_map"] == dict.fromkeys(sorted(names), shard().file)
    assert content["metadata"]["total_size"] == shard().nbytes
