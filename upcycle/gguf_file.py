"""A ``.gguf`` file of the Llama family as a dense checkpoint: tensors are dequantized one at a time.

Names and metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, EnvironmentFault, RefusalError
from upcycle.tensor_files import TensorSpec

if TYPE_CHECKING:
    import torch

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufFile:
    """Tensors under their Hugging Face names, in bfloat16 whatever the quantization.

    Quantization noise is far above bfloat16 rounding; ``--dtype float32`` keeps every bit of the dequantized values.

    Raises:
        CheckpointError: not a GGUF file, or damaged.
        RefusalError: another architecture than llama.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise EnvironmentFault(
                "reading a .gguf file needs the gguf package", hint="pip install 'upcycle[gguf]'"
            ) from None
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file: {error}", hint="download it again") from None
        self._dequantize = gguf.quants.dequantize
        self._fields = reader.fields
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise RefusalError(
                f"{path} holds a '{architecture}' model; only llama GGUF files are read",
                hint="convert the safetensors checkpoint it was made from",
            )
        self._tensors = {
            self._name(tensor.name): tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"
        }
        if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
            raise RefusalError(
                f"{path} has scaled rotary frequencies (Llama 3.1), whose settings GGUF does not keep",
                hint="convert the safetensors checkpoint it was made from",
            )
        # GGUF lists dimensions innermost first.
        self.specs = {
            name: TensorSpec(tuple(int(n) for n in reversed(tensor.shape)), "bfloat16")
            for name, tensor in self._tensors.items()
        }
        self.config = self._config()
        with path.open("rb") as file:
            header = file.read(reader.data_offset)
        self.fingerprint = hashlib.sha256(header + str(path.stat().st_size).encode()).hexdigest()

    def _value(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def metadata(self, key: str) -> Any:
        """What the file says of itself under a key, or None."""
        return self._value(key)

    def _name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".", 2)
            if part in _LAYER:
                return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
        elif stem in _GLOBAL:
            return f"{_GLOBAL[stem]}.{kind}"
        raise RefusalError(f"{self.path}: tensor '{name}' is not part of a dense Llama model")

    def _config(self) -> dict[str, Any]:
        heads = self._value("llama.attention.head_count")
        if self._value("llama.rope.scaling.type") not in (None, "none"):
            raise RefusalError(f"{self.path} has scaled rotary frequencies", hint="convert the safetensors checkpoint")
        return {
            "model_type": "llama",
            "hidden_size": self._value("llama.embedding_length"),
            "intermediate_size": self._value("llama.feed_forward_length"),
            "num_hidden_layers": self._value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("llama.attention.head_count_kv", heads),
            "head_dim": self._value("llama.attention.key_length"),
            "rms_norm_eps": _shortest(self._value("llama.attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": self._value("llama.context_length"),
            "rope_theta": _shortest(self._value("llama.rope.freq_base", 10000.0)),
            "vocab_size": self.specs["model.embed_tokens.weight"].shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.specs,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._value("tokenizer.ggml.padding_token_id"),
            "dtype": "bfloat16",
        }

    def location(self, name: str) -> str:
        """The file."""
        return str(self.path)

    def read(self, name: str) -> torch.Tensor:
        """Dequantize one tensor to fp32."""
        return self._rows(name, 0, self.specs[name].shape[0])

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """One block: quantized tensors are small."""
        yield self._rows(name, *part) if part else self.read(name)

    def _rows(self, name: str, first: int, count: int) -> torch.Tensor:
        import torch

        tensor, spec = self._tensors[name], self.specs[name]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        rows = slice(None) if heads else slice(first, first + count)  # rows of a head are read together
        try:
            values = torch.from_numpy(self._dequantize(tensor.data[rows], tensor.tensor_type).copy())
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{self.path}: tensor '{name}' is {kind}, which gguf cannot dequantize") from None
        values = values.view(-1, *spec.shape[1:])
        return _half_split(values, self.config[heads])[first : first + count] if heads else values


def _shortest(value: float) -> float:
    """GGUF stores fp32: 1e-5 reads as 9.999999747e-06. The shortest decimal with the same fp32 value is what was meant."""
    import numpy

    return float(str(numpy.float32(value)))


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaved rotary order: rows (0, 1), (2, 3), ... of a head become (0, h/2), (1, h/2+1), ..."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
