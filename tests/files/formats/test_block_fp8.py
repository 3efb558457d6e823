"""FP8 weights with scales per block, against stock transformers' own reading of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import CheckpointError, EnvironmentFault, RefusalError
from upcycle.models.stock_model import source_model

Pico = Callable[[str], Path]
BLOCK = 8


def in_fp8(dense: Path, folder: Path, block: int = BLOCK, settings: dict[str, Any] | None = None) -> Path:
    """Store every matrix of the layers in FP8, as DeepSeek-V3 does."""
    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if ".layers." not in name or tensor.ndim < 2:
            tensors[name] = tensor
            continue
        blocks = tensor.float().unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        values = (blocks / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        tensors |= {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic", "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fp8 | (settings or {})}))
    for file in dense.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_tensors_are_those_stock_transformers_reads(pico: Pico, tmp_path: Path) -> None:
    folder = in_fp8(pico("qwen3"), tmp_path / "fp8")
    wanted = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=wanted).state_dict()
    checkpoint = DenseCheckpoint.open(str(folder))
    assert checkpoint.store.specs.keys() == stock.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(stock[name], load_stock_model(pico("qwen3")).state_dict()[name]), "FP8 rounds"
    for key, tensor in stock.items():
        assert torch.equal(checkpoint.read(key, "float32"), tensor), key
    for most_bytes in (1, 700, 1 << 20):
        pieces = list(checkpoint.store.chunks(name, most_bytes, (3, 21)))
        assert torch.equal(torch.cat(pieces), stock[name][3:24])
    for streamed in (False, True):
        model = source_model(checkpoint, None, streamed)
        model.load(1)
        assert torch.equal(model.layers[1].mlp.down_proj.weight, stock[name])


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_converts_and_verifies(dtype: str, pico: Pico, tmp_path: Path) -> None:
    folder = in_fp8(pico("qwen3"), tmp_path / "fp8")
    result = upcycle.convert(str(folder), tmp_path / "out", experts=4, dtype=dtype, verification={"tokens": 64})
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert any("stored in FP8" in warning for warning in result.plan.warnings) is (dtype == "keep")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(model.config, "quantization_config", None) is None
    assert model.dtype == (torch.float32 if dtype == "keep" else torch.bfloat16)


def test_what_is_misread_of_it_is_found(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is transformers' own reading: a mistake of this tool's is not in both."""
    from upcycle.errors import VerificationError
    from upcycle.files.formats.block_fp8 import BlockFp8Folder

    right = BlockFp8Folder.chunks
    monkeypatch.setattr(BlockFp8Folder, "chunks", lambda *given: (1.01 * block for block in right(*given)))
    with pytest.raises(VerificationError, match="relative logit error"):
        keys = {"experts": 2, "verification": {"tokens": 32}}
        upcycle.convert(str(in_fp8(pico("qwen3"), tmp_path / "fp8")), tmp_path / "out", **keys)


def test_bad_scales_other_formats_and_a_missing_library_are_refused(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_fp8(pico("qwen3"), tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    odd = {**tensors, f"{name}_scale_inv": torch.ones(7, 4)}
    save_file(odd, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{name}' has the shape .* do not divide it into equal blocks"):
        DenseCheckpoint.open(str(folder))
    del odd[f"{name}_scale_inv"]
    save_file(odd, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusalError, match=rf"quantized \(fp8\): tensor '{name}' is float8_e4m3fn"):
        DenseCheckpoint.open(str(folder))
    other = in_fp8(pico("qwen3"), tmp_path / "other", settings={"quant_method": "compressed-tensors"})
    with pytest.raises(RefusalError, match=r"quantized \(compressed-tensors\)"):
        DenseCheckpoint.open(str(other))
    monkeypatch.setattr("upcycle.files.formats.block_fp8.find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault, match="FP8 weights, which transformers reads with accelerate"):
        DenseCheckpoint.open(str(in_fp8(pico("qwen3"), tmp_path / "again")))
