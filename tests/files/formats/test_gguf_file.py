"""GGUF sources against stock transformers' own GGUF reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from wrapped_models import small_model

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import CheckpointError, RefusalError, UpcycleError, UsageError, VerificationError
from upcycle.files.formats.gguf_file import GgufFile
from upcycle.files.formats.tensor_files import SafetensorsFolder

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip


HEAD = ["output.weight"]
GEMMA3_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def new_name(name: str, names: dict[str, str]) -> str:
    """A tensor's name in the file."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{names[part]}.{kind}"


def gemma3(folder: Path, **changes: Any) -> Path:
    """A small Gemma 3, with heads as the real ones'."""
    keys: dict[str, Any] = {"num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
    keys |= {"sliding_window": 8, "layer_types": None, "query_pre_attn_scalar": 256, "vocab_size": 256, **changes}
    small_model("gemma3_text", **keys).save_pretrained(folder)
    return folder


def write_gguf(
    dense: Path,
    path: Path,
    architecture: str = "llama",
    quantized: bool = False,
    half: bool = False,
    metadata: dict[str, Any] | None = None,
    without: Sequence[str] = (),
    **extra: float,
) -> Path:
    """What llama.cpp's converter writes: renamed tensors, in a Llama with rotary rows interleaved."""
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
    writer.add_rope_freq_base(1e6 if architecture == "gemma3" else 10000.0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (metadata or {}).items():
        add = {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, stored in model.state_dict().items():
        tensor = stored
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and architecture == "llama":
                tensor = tensor.view(heads, 2, len(tensor) // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)
        new = new_name(name, HF_TO_GGUF | (GEMMA3_NORMS if architecture == "gemma3" else {}))
        if architecture == "gemma3" and "norm" in name:
            tensor = tensor + 1
        if new in without:
            continue
        data = tensor.float().numpy()
        if quantized and data.ndim == 2:
            packed = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(new, gguf.quants.quantize(data, packed), raw_dtype=packed)
        elif half and data.ndim == 2:
            writer.add_tensor(new, data.astype(np.float16))
        else:
            writer.add_tensor(new, data)
    for name in extra:
        writer.add_tensor(f"{name}.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.one_in(2)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_tensors_are_those_stock_transformers_reads(
    pico: Callable[[str], Path], tmp_path: Path, quantized: bool, name: str
) -> None:
    path = write_gguf(pico(name), tmp_path / "m.gguf", architecture=name, quantized=quantized)
    stock = load_stock_model(path).state_dict()
    checkpoint = DenseCheckpoint.open(str(path))
    if checkpoint.config.tie_word_embeddings:
        del stock["lm_head.weight"]
    assert checkpoint.store.specs.keys() == stock.keys()
    for key, tensor in stock.items():
        assert torch.equal(checkpoint.read(key, "float32"), tensor), key
        assert checkpoint.read(key).dtype == torch.float32
        assert torch.equal(checkpoint.read(key), tensor), key


@pytest.mark.long
@pytest.mark.parametrize("quantized", [False, True])
def test_gemma_3_is_read_as_transformers_reads_it(tmp_path: Path, quantized: bool) -> None:
    """Its norms add 1, which the file holds added; every sixth layer is a full one, which it does not hold."""
    dense = gemma3(tmp_path / "dense")
    window = {"gemma3.attention.sliding_window": 8}
    path = write_gguf(
        dense, tmp_path / "m.gguf", architecture="gemma3", quantized=quantized, metadata=window, without=HEAD
    )
    stock, checkpoint = load_stock_model(path), DenseCheckpoint.open(str(path))
    assert stock.config.layer_types == [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    tensors = {name: tensor for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
    assert checkpoint.store.specs.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(checkpoint.read(key), tensor), key
    keys: dict[str, Any] = {"experts": 4, "top_k": 2, "tokenizer": "none", "verification": {"tokens": 64}}
    result = upcycle.convert(str(path), tmp_path / "out", **keys).verification
    assert result is not None
    assert result.verdict == "exact"
    if not quantized:
        ids = torch.arange(5, 29)[None]
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
            found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert torch.linalg.norm(found - expected) < 2e-6 * torch.linalg.norm(expected)
    other = gemma3(tmp_path / "other", head_dim=128)
    odd = write_gguf(other, tmp_path / "odd.gguf", architecture="gemma3", metadata=window)
    with pytest.raises(RefusalError, match="heads of 128, and how gemma3 scales attention scores is known for 256"):
        DenseCheckpoint.open(str(odd))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_converts_and_verifies(pico: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    path = write_gguf(pico(name), tmp_path / "m.gguf", architecture=name, quantized=True)
    result = upcycle.convert(str(path), tmp_path / "out", experts=4, tokenizer="none")
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.text.startswith("random token ids")


def test_other_architectures_and_scaled_ropes_are_refused(pico: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=r"holds a 'qwen2moe' model; GGUF files of llama, qwen2, .* are read"):
        GgufFile(write_gguf(pico("llama"), tmp_path / "q.gguf", architecture="qwen2moe"))
    other = write_gguf(pico("qwen3"), tmp_path / "o.gguf", architecture="qwen2")
    with pytest.raises(RefusalError, match=r"tensor 'blk.0.attn_k_norm.weight' is not part of a dense qwen2 model"):
        DenseCheckpoint.open(str(other))
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


def test_half_precision_is_kept(pico: Callable[[str], Path], tmp_path: Path) -> None:
    """Every value, and said: matrices in float16, norms in float32, as the file has them."""
    path = write_gguf(pico("llama"), tmp_path / "m.gguf", half=True)
    result = upcycle.convert(str(path), tmp_path / "out", experts=4, tokenizer="none", verification={"tokens": 64})
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    stock = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.float32).state_dict()
    written = SafetensorsFolder(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(written.read(name), stock[name].half()), name
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(written.read(norm), stock[norm].float())


def test_quantized_values_are_all_held_and_the_user_is_told(pico: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(pico("llama"), tmp_path / "m.gguf", quantized=True)
    kept = upcycle.plan(str(path), experts=4, tokenizer="none")
    assert any("Q8_0" in warning and "float32" in warning for warning in kept.warnings)
    chosen = upcycle.plan(str(path), experts=4, tokenizer="none", dtype="bfloat16")
    assert not any("Q8_0" in warning for warning in chosen.warnings)
    assert chosen.bytes_output < 0.6 * kept.bytes_output


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scale_linear": 4.0}, "'llama.rope.scale_linear' = 4.0, which changes what the model computes"),
        ({"llama.rope.scaling.type": "linear"}, "'llama.rope.scaling.type' = linear"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "scaled rotary frequencies"),
        ({"llama.attention.sliding_window": 64}, "'llama.attention.sliding_window' = 64"),
        ({"llama.expert_count": 8}, "'llama.expert_count' = 8"),
        ({"llama.logit_scale": 0.5}, "'llama.logit_scale' = 0.5"),
        ({"llama.attention.causal": False}, "'llama.attention.causal' = False"),
        ({"llama.rope.dimension_count": 4}, "'llama.rope.dimension_count' = 4 where a head has 8"),
        ({"llama.attention.value_length": 16}, "'llama.attention.value_length' = 16"),
        ({"llama.some.new_key": 1}, "'llama.some.new_key' = 1, which is not known here"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, r"'llama.attention.head_count_kv' is \[2, 2, 1\]"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "'llama.attention.layer_norm_rms_epsilon' is x"),
        ({"general.type": "adapter"}, "'general.type' is adapter"),
        ({"split.count": 2}, "one part of a GGUF file that was split into 2"),
    ],
)
def test_metadata_that_changes_the_function_is_refused_by_name(
    metadata: dict[str, Any], message: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError, match=message):
        GgufFile(write_gguf(pico("llama"), tmp_path / "m.gguf", metadata=metadata))


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scale_linear": 1.0},
        {"llama.rope.scaling.type": "none"},
        {"llama.expert_count": 0},
        {"general.name": "x", "general.type": "model", "tokenizer.ggml.pre": "x", "quantize.imatrix.file": "x"},
        {"somebody.quantize_version": 2, "split.count": 0},
    ],
)
def test_metadata_that_changes_nothing_is_read_over(
    metadata: dict[str, Any], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    assert DenseCheckpoint.open(
        str(write_gguf(pico("llama"), tmp_path / "m.gguf", metadata=metadata))
    ).config.hidden_size


def test_biases_are_read(pico: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(pico("llama-bias"), tmp_path / "m.gguf")
    stock = AutoModelForCausalLM.from_pretrained(pico("llama-bias"), dtype=torch.float32).state_dict()
    checkpoint = DenseCheckpoint.open(str(path))
    assert checkpoint.config.qkv_bias
    assert checkpoint.store.specs.keys() == stock.keys()
    for name, tensor in stock.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    some = write_gguf(pico("llama-bias"), tmp_path / "some.gguf", without=("blk.1.attn_output.bias",))
    with pytest.raises(RefusalError, match="only some projections have biases"):
        GgufFile(some)


def test_a_file_without_a_tokenizer_or_a_tensor_says_so(pico: Callable[[str], Path], tmp_path: Path) -> None:
    path = write_gguf(pico("llama"), tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="has no tokenizer") as caught:
        upcycle.plan(str(path), experts=4)
    assert "tokenizer.ggml.tokens" in caught.value.message
    for missing in ("blk.1.ffn_down.weight", "token_embd.weight"):
        with pytest.raises(CheckpointError, match="is missing") as lacking:
            DenseCheckpoint.open(str(write_gguf(pico("llama"), tmp_path / "part.gguf", without=(missing,))))
        assert "config.json" not in f"{lacking.value.message} {lacking.value.hint}"


def test_no_damage_to_a_header_ends_untyped(pico: Callable[[str], Path], tmp_path: Path) -> None:
    whole = write_gguf(pico("llama"), tmp_path / "m.gguf").read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[generator.integers(4, 2500)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            DenseCheckpoint.open(str(path))
        except UpcycleError as error:
            assert error.hint
