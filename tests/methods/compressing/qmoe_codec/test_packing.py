"""Packed folders give the same files again, byte for byte, and say what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import CheckpointError, UpcycleError, UsageError
from upcycle.ffn.rounding.ternary import nearest_ternary
from upcycle.files.local_names import LOCAL_NAMES_FILE
from upcycle.methods.compressing.qmoe_codec.packing import pack_model, unpack_model

Models = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the one that says where this machine keeps the sources."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCAL_NAMES_FILE}


@pytest.fixture
def ternary(pico_moe: Models, tmp_path: Path) -> Path:
    """A MoE with fused experts, of which one is not ternary."""
    source, folder = pico_moe("mixtral", True), tmp_path / "ternary"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "experts." in name:
            tensor[1:] = nearest_ternary(tensor[1:])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_packed_model_is_smaller_and_comes_back(ternary: Path, tmp_path: Path) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    said = pack_model(ternary, packed)
    tensors = load_file(ternary / "model.safetensors")
    experts = [tensor for name, tensor in tensors.items() if "experts." in name]
    assert said.ternary == sum(tensor[1:].numel() for tensor in experts)
    raw, small = (ternary / "model.safetensors").stat().st_size, (packed / "model.packed").stat().st_size
    assert small < raw - sum(tensor[1:].nbytes for tensor in experts) / 2
    assert not list(packed.glob("*.safetensors*"))
    assert unpack_model(packed, out).ternary == said.ternary
    assert contents(out) == contents(ternary)
    pack_model(ternary, packed, overwrite=True)
    unpack_model(packed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(ternary)


def test_a_compressed_model_is_packed_by_command(pico_moe: Models, tmp_path: Path) -> None:
    upcycle.convert(
        str(pico_moe("qwen3_moe")),
        tmp_path / "moe",
        method="qmoe",
        refit="none",
        calibration={"text": "demo", "tokens": 512, "window": 32},
        verification={"tokens": 64},
        max_shard_size="60KB",
    )
    for verb, source, out in (("pack", "moe", "packed"), ("unpack", "packed", "out")):
        result = CliRunner().invoke(cli, [verb, str(tmp_path / source), str(tmp_path / out), "--json"])
        assert result.exit_code == 0, result.output
        assert set(json.loads(result.output)) == {"out", "bytes", "bytes_packed", "ternary", "bits_per_weight"}
    assert len(list((tmp_path / "packed").glob("*.packed"))) > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "moe")
    source = str(pico_moe("qwen3_moe"))
    assert upcycle.verify(tmp_path / "out", source=source, tokens=64).verdict == "approximate"
    for use in (upcycle.verify, lambda folder: upcycle.plan(str(folder), method="qmoe")):
        with pytest.raises(UpcycleError, match="packed") as caught:
            use(tmp_path / "packed")
        assert "upcycle unpack" in str(caught.value.hint)


def test_a_model_without_ternary_experts_is_refused(pico_moe: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ternary matrix"):
        pack_model(pico_moe("mixtral"), tmp_path / "packed")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="no such folder"):
        pack_model(tmp_path / "nothing", tmp_path / "packed")
    with pytest.raises(CheckpointError, match="no packed model"):
        unpack_model(pico_moe("mixtral"), tmp_path / "out")


def damaged(folder: Path, name: str, change: Callable[[bytearray], None]) -> None:
    content = bytearray((folder / name).read_bytes())
    change(content)
    (folder / name).write_bytes(content)


def test_damage_is_named_and_leaves_nothing(ternary: Path, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UpcycleError, match=words):
            unpack_model(tmp_path / "packed", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    packed = tmp_path / "packed"
    pack_model(ternary, packed)
    whole = contents(packed)

    def again() -> None:
        for name, content in whole.items():
            (packed / name).write_bytes(content)

    damaged(packed, "model.packed", lambda content: content.__delitem__(slice(-9, None)))
    refused("model.packed is damaged: it has")
    again()
    damaged(packed, "model.packed", lambda content: content.__setitem__(-1, content[-1] ^ 1))
    refused("model.packed")
    again()
    (packed / "model.packed").unlink()
    refused("model.packed is missing")
    again()
    record = json.loads(whole["upcycle.json"])
    for key, value, words in (
        ("dictionary", "other", "dictionary 'other'"),
        ("files", {"../x": {"stored": "model.packed", "sha256": ""}}, "key 'packed.files'"),
        ("files", {"x": {"stored": "../x", "sha256": ""}}, "key 'packed.files'"),
        ("ternary", "many", "key 'packed'"),
    ):
        (packed / "upcycle.json").write_text(json.dumps({**record, "packed": {**record["packed"], key: value}}))
        refused(words)


def test_every_code_that_is_changed_is_found(ternary: Path, tmp_path: Path) -> None:
    pack_model(ternary, tmp_path / "packed")
    path = tmp_path / "packed" / "model.packed"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(":codes"))
    for code in (7, -1):  # another word, and one that does not exist
        changed = {**tensors, name: tensors[name].clone()}
        assert int(changed[name][0]) != code
        changed[name][0] = code
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=r"model\.packed"):
            unpack_model(tmp_path / "packed", tmp_path / "out")
    assert torch.equal(load_file(ternary / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight::tensor"])
