"""Folders and files of the wrong kind: what lies there is recognised, named, and the way out is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import UpcycleError
from upcycle.files.formats.tensor_files import SINGLE

# files -> words of the message
WITHOUT_CONFIG: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("is an empty folder", "config.json is missing"),
    ("adapter_config.json", "adapter_model.safetensors"): ("LoRA adapter", "upcycle merge"),
    ("adapter_model.bin",): ("LoRA adapter", "upcycle merge"),
    ("m.Q4_K_M.gguf",): ("GGUF files (m.Q4_K_M.gguf)", "name the .gguf file itself"),
    ("consolidated.safetensors", "params.json"): ("Mistral's own format", "consolidated"),
    ("consolidated.00.pth", "params.json"): ("maker's own format", "config.json is missing"),
    ("tokenizer.json", "tokenizer_config.json"): ("a tokenizer only", "config.json is missing"),
    ("model.safetensors",): ("holds weights (model.safetensors)", "config.json is missing"),
    ("model.onnx",): ("an ONNX export",),
    ("tf_model.h5",): ("TensorFlow weights",),
    ("flax_model.msgpack",): ("Flax weights",),
    ("weights.npz",): ("MLX or NumPy weights",),
    ("pytorch_model.bin",): ("only pickle weights", "loading them can run code"),
    ("model.safetensors.incomplete",): ("a download that has not finished",),
    ("model_index.json",): ("a diffusion pipeline",),
    ("snapshots/abc/config.json", "refs/main"): ("hub's cache", "snapshots/"),
    ("checkpoint-500/config.json",): ("folders below have one (checkpoint-500)", "name the folder below"),
    ("global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py"): ("a training checkpoint in parts",),
    ("notes.txt",): ("holds notes.txt", "config.json is missing"),
}
WITHOUT_WEIGHTS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("holds no weights", "hf download"),
    ("tokenizer.json",): ("a tokenizer and no weights",),
    ("model-00001-of-00002.safetensors",): ("shards of weights", "without their index"),
    ("model.fp16.safetensors",): ("model.fp16.safetensors, and no model.safetensors",),
    ("m.gguf",): ("GGUF files",),
    ("pytorch_model-00001-of-00002.bin",): ("only pickle weights",),
    ("adapter_config.json",): ("LoRA adapter",),
}


def fill(folder: Path, files: tuple[str, ...]) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"{}")


def message(source: Path) -> str:
    with pytest.raises(UpcycleError) as caught:
        DenseCheckpoint.open(str(source))
    assert caught.value.hint
    assert "bug in upcycle" not in caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize("files", WITHOUT_CONFIG)
def test_a_folder_without_config(files: tuple[str, ...], tmp_path: Path) -> None:
    fill(tmp_path, files)
    said = message(tmp_path)
    for words in WITHOUT_CONFIG[files]:
        assert words in said


@pytest.mark.parametrize("files", WITHOUT_WEIGHTS)
def test_a_folder_without_weights(files: tuple[str, ...], pico: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(pico("llama") / "config.json", tmp_path)
    fill(tmp_path, files)
    said = message(tmp_path)
    for words in WITHOUT_WEIGHTS[files]:
        assert words in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "a web page"),
        (b"PK\x03\x04 and the rest of an archive", "a pickle or zip file"),
        (b"\x80\x02}q\x00. and so on, a pickle", "a pickle under another name"),
        (b"GGUF\x03\x00\x00\x00 and so on", "a GGUF file under another name"),
        (bytes(4096), "has not finished"),
        (b"\x1f\x8b\x08\x00 and so on, gzipped", "is compressed"),
    ],
)
@pytest.mark.parametrize("file", [SINGLE, "config.json"])
def test_a_file_that_is_something_else(
    file: str, content: bytes, words: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("config.json", SINGLE):
        shutil.copy(pico("llama") / name, tmp_path)
    (tmp_path / file).write_bytes(content)
    said = message(tmp_path)
    assert words in said
    assert str(tmp_path / file) in said


def test_an_adapter_beside_a_whole_model_is_refused(pico: Callable[[str], Path], tmp_path: Path) -> None:
    """With peft installed, stock transformers would load the adapter on top: another function."""
    folder = shutil.copytree(pico("llama"), tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "would add it to the model that lies beside it" in message(folder)


def renamed(
    rename: Callable[[str], str], drop: str = ""
) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {rename(name): value for name, value in tensors.items() if name != drop}


NAMES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "language_model": (renamed(lambda n: n.replace("model.", "model.language_model.", 1)), "a vision-language model's names"),
    "llava": (renamed(lambda n: "language_model." + n), "a vision-language model's names"),
    "compiled": (renamed(lambda n: "_orig_mod." + n), "torch.compile's names"),
    "parallel": (renamed(lambda n: "module." + n), "a data-parallel wrapper's names"),
    "peft": (renamed(lambda n: "base_model.model." + n), "a PEFT wrapper's names"),
    "bare": (renamed(lambda n: n.removeprefix("model."), "lm_head.weight"), "a model without a head"),
    "headless": (renamed(lambda n: n, "lm_head.weight"), "a model without a head: 'lm_head.weight' is missing"),
    "lora": (
        lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 32)},
        "a LoRA adapter that is not merged",
    ),
    "vision": (lambda t: {**t, "visual.blocks.0.attn.qkv.weight": torch.zeros(4, 4)}, "vision-language or audio"),
    "classifier": (lambda t: {**t, "score.weight": torch.zeros(2, 32)}, "a head for classes or rewards"),
    "experts": (lambda t: {**t, "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(4, 4)}, "Mixture-of-Experts"),
    "gptq": (renamed(lambda n: n.replace("proj.weight", "proj.qweight")), "are quantized"),
    "fp8": (lambda t: {**t, "model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(1, 1)}, "are quantized"),
    "float8": (lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}, "are quantized"),
    "int8": (lambda t: {**t, "model.norm.weight": t["model.norm.weight"].char()}, "'model.norm.weight' is int8"),
    "nothing": (lambda t: {}, "hold no tensor"),
    "layers": (renamed(lambda n: n.replace("layers.2", "layers.3")), "'num_hidden_layers' is 3, the weights have 4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_tensors_of_another_kind(kind: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    change, words = NAMES[kind]
    shutil.copy(pico("llama") / "config.json", tmp_path)
    save_file(change(load_file(pico("llama") / SINGLE)), tmp_path / SINGLE, metadata={"format": "pt"})
    assert words in message(tmp_path)


@pytest.mark.parametrize("key", ["text_config", "llm_config", "thinker_config"])
def test_a_multimodal_configuration_names_its_text_model(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_vlm", key: {"model_type": "llama"}}))
    said = message(tmp_path)
    assert "multimodal" in said
    assert "text model" in said
    assert "'llama'" in said


def test_a_leftover_quantization_config_over_plain_weights_changes_nothing(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(pico("llama"), tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(raw))
    result = upcycle.convert(str(folder), tmp_path / "out", experts=2, verification={"tokens": 64})
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
