"""Weights of every dtype: what is planned is written, every value is held, and what overflows is said before it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SINGLE, SafetensorsFolder, widest

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


def changed(dense: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(dense, folder, dirs_exist_ok=True)
    tensors = {name: change(name, tensor) for name, tensor in load_file(dense / SINGLE).items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    ("dtypes", "experts"),
    [
        ({"": torch.float64}, "float64"),
        ({"": torch.bfloat16, "up_proj": torch.float32}, "float32"),
        ({"": torch.float16, "up_proj": torch.bfloat16}, "float32"),
        ({"": torch.float16, "norm": torch.float32}, "float16"),
        ({"": torch.bfloat16, "layers.1.mlp.down_proj": torch.float32}, "float32"),
    ],
    ids=["float64", "up-float32", "two-halves", "norms-float32", "one-layer"],
)
@pytest.mark.parametrize("method", ["sparse_upcycling", "random_split"])
def test_unlike_dtypes_are_all_held(
    method: str, dtypes: dict[str, torch.dtype], experts: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to([dtype for part, dtype in dtypes.items() if part in name][-1])

    source = changed(pico("llama"), tmp_path / "m", change)
    keys = {"method": method, "experts": 2, "top_k": 2, "tokenizer": "none", "verification": {"tokens": 64}}
    result = upcycle.convert(str(source), tmp_path / "out", **keys)
    assert result.verification is not None
    assert result.verification.verdict in ("exact", "rounded")
    written, held = SafetensorsFolder(tmp_path / "out"), SafetensorsFolder(source)
    assert sum(spec.nbytes for spec in written.specs.values()) == result.plan.bytes_output
    assert f'"dtype": "{experts}"' in (tmp_path / "out" / "config.json").read_text()
    one = "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    assert written.specs[one].dtype == experts
    if method == "sparse_upcycling":
        assert torch.equal(written.read(one).double(), held.read(UP).double())
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(written.read(name), held.read(name))


def test_the_widest_dtype_is_the_one_that_torch_promotes_to() -> None:
    names = ("float64", "float32", "float16", "bfloat16")
    for one in names:
        for two in names:
            wanted = torch.promote_types(getattr(torch, one), getattr(torch, two))
            assert widest((one, two)) == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "message"),
    [
        (7e4, torch.float32, "float16", "holds 7e\\+04, which overflows float16"),
        (3.4e38, torch.float32, "bfloat16", "holds 3.4e\\+38, which overflows bfloat16"),
        (1e300, torch.float64, "float32", "holds 1e\\+300, which overflows float32"),
        (float("nan"), torch.float32, "keep", "holds NaN"),
        (float("-inf"), torch.float16, "keep", "holds Inf"),
    ],
)
def test_what_a_dtype_cannot_hold_is_said_with_its_tensor(
    value: float, stored: torch.dtype, dtype: str, message: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(stored)
        if name == UP:
            tensor[3, 1] = value
        return tensor

    source = changed(pico("llama"), tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=f"'{UP}' {message}") as caught:
        upcycle.convert(str(source), tmp_path / "out", experts=2, dtype=dtype, tokenizer="none")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_expert_that_overflows_when_it_is_scaled_is_not_written(pico: Callable[[str], Path], tmp_path: Path) -> None:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clamp(-1, 1).mul(3e4).half() if "down_proj" in name else tensor.half()

    source = changed(pico("llama"), tmp_path / "m", change)
    keys = {"method": "random_split", "experts": 4, "top_k": 4, "tokenizer": "none"}
    with pytest.raises(CheckpointError, match=r"w2\.weight: after scaling or fitting, its weights overflow float16"):
        upcycle.convert(str(source), tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_a_source_replaced_under_the_same_times_and_sizes_is_found(pico: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(pico("llama"), tmp_path / "m")
    checkpoint = DenseCheckpoint.open(str(source))
    checkpoint.check_unchanged()
    stamp, size = (source / SINGLE).stat().st_mtime_ns, (source / SINGLE).stat().st_size
    changed(pico("llama"), source, lambda name, tensor: tensor + 1 if name == UP else tensor)
    os.utime(source / SINGLE, ns=(stamp, stamp))
    assert (source / SINGLE).stat().st_size == size
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.check_unchanged()
    assert DenseCheckpoint.open(str(source)).fingerprint == checkpoint.fingerprint  # headers and settings are the same


def test_a_conversion_does_not_go_on_with_another_source_under_the_same_times(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its weights, resumed after the source was replaced: the old layers are not mixed in."""
    from upcycle.conversion import convert

    source = shutil.copytree(pico("llama"), tmp_path / "m")
    stamp = (source / SINGLE).stat().st_mtime_ns
    keys = {"experts": 2, "tokenizer": "none", "verification": {"enabled": False}}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_write_companions", stop)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(str(source), tmp_path / "out", **keys)
    monkeypatch.undo()
    changed(pico("llama"), source, lambda name, tensor: tensor + 1 if name == UP else tensor)
    os.utime(source / SINGLE, ns=(stamp, stamp))
    result = upcycle.convert(str(source), tmp_path / "out", restart=True, **keys)
    assert not result.resumed
    written = SafetensorsFolder(tmp_path / "out").read("model.layers.1.block_sparse_moe.experts.0.w3.weight")
    assert torch.equal(written, load_file(source / SINGLE)[UP])
