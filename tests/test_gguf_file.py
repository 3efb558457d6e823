"""GGUF sources against stock transformers' own GGUF reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.checkpoint import DenseCheckpoint
from upcycle.errors import CheckpointError, RefusalError, VerificationError
from upcycle.gguf_file import GgufFile

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(dense: Path, path: Path, architecture: str = "llama", quantized: bool = False, **extra: float) -> Path:
    """What llama.cpp's converter writes for a Llama: renamed tensors, rotary rows interleaved."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for name, stored in model.state_dict().items():
        tensor = stored
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows, columns = tensor.shape
                tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            new = f"blk.{layer}.{HF_TO_GGUF[part]}.weight"
        else:
            new = f"{HF_TO_GGUF[stem]}.weight"
        data = tensor.float().numpy()
        if quantized and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(new, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, data)
    for name in extra:
        writer.add_tensor(f"{name}.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quantized", [False, True])
def test_tensors_are_those_stock_transformers_reads(
    pico: Callable[[str], Path], tmp_path: Path, quantized: bool
) -> None:
    path = write_gguf(pico("llama"), tmp_path / "m.gguf", quantized=quantized)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    checkpoint = DenseCheckpoint.open(str(path))
    assert checkpoint.store.specs.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(checkpoint.read(name, "float32"), tensor), name
        assert checkpoint.read(name).dtype == torch.bfloat16


def test_converts_and_verifies(pico: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(pico("llama"), tmp_path / "m.gguf", quantized=True)
    result = upcycle.convert(str(path), tmp_path / "out", experts=4, tokenizer="none")
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.text.startswith("random token ids")


def test_other_architectures_and_scaled_ropes_are_refused(pico: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="only llama GGUF files"):
        GgufFile(write_gguf(pico("llama"), tmp_path / "q.gguf", architecture="qwen2"))
    with pytest.raises(RefusalError, match="scaled rotary frequencies"):
        GgufFile(write_gguf(pico("llama"), tmp_path / "r.gguf", rope_freqs=1))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model at all, just some bytes")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        GgufFile(tmp_path / "m.gguf")


def test_a_stack_of_its_layers_is_a_stock_model(pico: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(pico("llama"), tmp_path / "model.gguf")
    keys = {"method": "depth_stack", "parameters": {"growth": 2}, "tokenizer": "none"}
    result = upcycle.convert(str(path), tmp_path / "out", **keys, verification={"tokens": 64}).verification
    assert result is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert result.compared_tensors == len(model.state_dict())
    dense = DenseCheckpoint.open(str(path))
    for layer in range(6):
        stacked = model.state_dict()[f"model.layers.{layer}.self_attn.k_proj.weight"]
        assert torch.equal(stacked, dense.read(f"model.layers.{layer % 3}.self_attn.k_proj.weight"))


def test_what_is_misread_of_it_is_found(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is transformers' own GGUF loader: a mistake of this tool's is not in both."""
    right = GgufFile.read
    wrong = "model.layers.1.self_attn.o_proj.weight"
    monkeypatch.setattr(
        GgufFile,
        "chunks",
        lambda self, name, *_: iter([right(self, name) * (1.01 if name == wrong else 1)]),
    )
    keys = {"experts": 2, "tokenizer": "none", "verification": {"tokens": 32}}
    with pytest.raises(VerificationError, match="relative logit error"):
        upcycle.convert(str(write_gguf(pico("llama"), tmp_path / "m.gguf")), tmp_path / "out", **keys)
