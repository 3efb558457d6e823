"""Reads a ``.gguf`` file as a dense checkpoint, and dequantizes its tensors one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, EnvironmentFault, RefusalError
from upcycle.files.formats.folder_contents import shortened, something_else
from upcycle.files.formats.gguf_architectures import ARCHITECTURES
from upcycle.files.formats.settings import DECIMAL, SIZE
from upcycle.files.formats.tensor_files import SAMPLE_BYTES
from upcycle.files.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

# Metadata keys of the architecture that this module reads.
_READ = (
    *("embedding_length", "feed_forward_length", "block_count", "context_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
)
# Metadata keys that can change the function, with the values that leave it as it is. All other keys are refused by name.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.finetuned": (False,),
    "rope.scaling.type": ("none",),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
# The dtype in which a tensor is read, so that it holds every value exactly. Values of a quantized block are products of a
# half-precision scale and small integers, which have more bits than half precision holds.
_KEPT = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZED = "float32"
_SCALED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_ELSEWHERE = "convert the safetensors checkpoint that it was made from"


class GgufFile:
    """Gives the tensors of a ``.gguf`` file under their Hugging Face names, each in a dtype that holds all its values.

    The file has names of its own: :meth:`name_tensors` must be called before a tensor is read. Every metadata key of the
    architecture is read or refused. Keys of other namespaces (``general``, ``tokenizer`` and those of tools) are ignored, as no
    engine computes with them.

    Raises:
        CheckpointError: the file is not a GGUF file, is damaged, or is a part of one.
        RefusalError: its architecture is not read here, or a metadata key changes what the model computes.
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
            self._metadata = {name: _contents(name, field) for name, field in reader.fields.items()}
            self._stored = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # for a damaged file the package raises whatever error it runs into
            raise something_else(path) or CheckpointError(
                f"{path} is not a readable GGUF file: {shortened(str(error))}", hint="download it again"
            ) from None
        self._dequantize = gguf.quants.dequantize
        self._architecture = self._readable()
        self._described = ARCHITECTURES[self._architecture]
        self._tensors: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.config = self._config()
        with path.open("rb") as file:
            self._header = reader.data_offset
            header = file.read(self._header)
        self.fingerprint = hashlib.sha256(header + str(path.stat().st_size).encode()).hexdigest()

    def name_tensors(self, names: Collection[str]) -> None:
        """Give the tensors the names of the dense architecture, as the gguf package translates them.

        Args:
            names: those of all tensors that a checkpoint with this configuration has.

        Raises:
            RefusalError: the file has a tensor with none of these names.
        """
        import gguf

        known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(known[self._architecture], self._number("block_count"))
        found = {table.get_name(name, try_suffixes=(".weight", ".bias")): name for name in names}
        if other := sorted(set(self._stored) - found.keys()):
            raise RefusalError(
                f"{self.path}: tensor '{shortened(other[0])}' is not part of a dense {self._architecture} model",
                hint=_ELSEWHERE,
            )
        self._tensors = {found[name]: tensor for name, tensor in self._stored.items()}
        self.specs = {name: _spec(tensor) for name, tensor in self._tensors.items()}

    def _readable(self) -> str:
        """Return the architecture of a whole, dense model whose metadata leaves its function as stock code computes it.

        Everything else is refused.
        """
        parts = self._metadata.get("split.count", 0)
        if parts not in (0, 1):
            raise CheckpointError(
                f"{self.path} is one part of a GGUF file that was split into {shortened(parts)}",
                hint="join them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf",
            )
        kind, architecture = (self._metadata.get(f"general.{key}") for key in ("type", "architecture"))
        if kind not in (None, "model"):
            raise RefusalError(f"{self.path} holds no model: 'general.type' is {shortened(kind)}", hint=_ELSEWHERE)
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise RefusalError(
                f"{self.path} holds a '{shortened(architecture)}' model; GGUF files of {', '.join(ARCHITECTURES)} are read",
                hint=_ELSEWHERE,
            )
        if scaled := sorted(_SCALED & self._stored.keys()):
            raise RefusalError(
                f"{self.path} has scaled rotary frequencies ('{scaled[0]}'), whose settings GGUF does not keep",
                hint=_ELSEWHERE,
            )
        mine = ARCHITECTURES[architecture].keys
        for name, value in self._metadata.items():
            namespace, _, key = name.partition(".")
            known = key in _READ or key in mine
            if namespace == architecture and not known and value not in _NEUTRAL.get(key, ()):
                what = "scaled rotary frequencies: " if key.startswith("rope.scal") else ""
                why = (
                    "changes what the model computes"
                    if key in _NEUTRAL
                    else "is not known here, and may change what the model computes"
                )
                raise RefusalError(
                    f"{self.path} has {what}metadata key '{name}' = {shortened(value)}, which {why}", hint=_ELSEWHERE
                )
        return architecture

    def metadata(self, key: str) -> Any:
        """Return the value of a metadata key, or None."""
        return self._metadata.get(key)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file holds a vocabulary, from which a tokenizer can be made."""
        return "tokenizer.ggml.model" in self._metadata and "tokenizer.ggml.tokens" in self._metadata

    def _number(self, key: str, default: float | None = None, whole: bool = True) -> Any:
        """Return the number under one of the architecture's metadata keys.

        Raises:
            CheckpointError: it is missing, not a number, or different for each layer.
        """
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if value is None or not (SIZE if whole else DECIMAL).fits(value):
            found = "is missing" if value is None else f"is {shortened(value)}"
            wanted = (SIZE if whole else DECIMAL).what
            raise CheckpointError(
                f"{self.path}: metadata key '{self._architecture}.{key}' {found}, and must be {wanted}",
                hint="download it again",
            )
        return value

    def _biases(self, parts: tuple[str, ...]) -> bool:
        """Return whether ``parts`` have biases: all of them in every layer, or none, as config.json cannot express anything else.

        Raises:
            RefusalError: only some have biases.
        """
        found = {name for name in self._stored if name.endswith(tuple(f".{part}.bias" for part in parts))}
        if len(found) not in (0, len(parts) * self._number("block_count")):
            raise RefusalError(
                f"{self.path}: only some projections have biases ('{min(found)}'), which no {self._architecture} "
                "configuration can say",
                hint=_ELSEWHERE,
            )
        return bool(found)

    def _config(self) -> dict[str, Any]:
        embeddings = self._stored.get("token_embd.weight")
        if embeddings is None:
            raise CheckpointError(f"{self.path}: tensor 'token_embd.weight' is missing", hint="download it again")
        heads, width = self._number("attention.head_count"), self._number("embedding_length")
        head = self._number("attention.key_length", max(width // heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._number(key, head) != head:
                raise RefusalError(
                    f"{self.path} has metadata key '{self._architecture}.{key}' = {self._number(key)} where a head has {head}",
                    hint=_ELSEWHERE,
                )
        first = self._stored.get("blk.0.ffn_up.weight")
        described = self._described
        if head != (described.head or head):
            raise RefusalError(
                f"{self.path} has heads of {head}, and how {self._architecture} scales attention scores is known for "
                f"{described.head} alone: the file does not say it",
                hint=_ELSEWHERE,
            )
        tokens = {key: f"tokenizer.ggml.{name}_token_id" for key, name in _TOKENS.items()}
        own = {
            config: self._number(key) for key, config in described.keys.items() if self._metadata.get(self._key(key))
        }
        return {
            "model_type": described.model_type,
            "hidden_size": width,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head,
            "rms_norm_eps": _shortest(self._number("attention.layer_norm_rms_epsilon", whole=False)),
            "max_position_embeddings": self._number("context_length"),
            "rope_theta": _shortest(self._number("rope.freq_base", 10000.0, whole=False)),
            "vocab_size": _spec(embeddings).shape[0],
            "tie_word_embeddings": "output.weight" not in self._stored,
            **{key: self._biases(parts) for key, parts in described.biases.items()},
            **{key: self._metadata.get(name) for key, name in tokens.items()},
            "dtype": _spec(first).dtype if first else _QUANTIZED,
            **described.constant,
            **own,
        }

    def _key(self, key: str) -> str:
        """Return the whole name of one of the architecture's metadata keys."""
        return f"{self._architecture}.{key}"

    @property
    def note(self) -> str | None:
        """A note for the user about the dtype of quantized tensors; None where there are none."""
        kinds = sorted({t.tensor_type.name for t in self._stored.values()} - set(_KEPT))
        if not kinds:
            return None
        return (
            f"quantized tensors ({', '.join(kinds)}) are read in {_QUANTIZED}, which holds every dequantized value; "
            "--dtype bfloat16 writes half as much and rounds"
        )

    def sample(self) -> str:
        """Return the SHA-256 of the header and of a few bytes of every tensor, as the file holds them now."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            digest.update(file.read(self._header))
            for tensor in self._stored.values():
                last = max(int(tensor.n_bytes) - SAMPLE_BYTES, 0)
                for position in sorted({0, last // 2, last}):
                    file.seek(int(tensor.data_offset) + position)
                    digest.update(file.read(min(SAMPLE_BYTES, int(tensor.n_bytes))))
        return digest.hexdigest()

    def location(self, name: str) -> str:
        """Return the file, which holds every tensor."""
        return str(self.path)

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor, dequantized to the dtype in ``specs``."""
        return self._rows(name, 0, self.specs[name].shape[0])

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor, or the rows ``part`` of it, in one block whatever its size: quantized tensors are small."""
        yield self._rows(name, *part) if part else self.read(name)

    def _rows(self, name: str, first: int, count: int) -> torch.Tensor:
        import torch

        tensor, spec = self._tensors[name], self.specs[name]
        heads = _HEADS.get(name.split(".")[-2]) if self._described.interleaved else None
        rows = slice(None) if heads else slice(first, first + count)  # the rows of a head must be reordered together
        try:
            values = torch.from_numpy(self._dequantize(tensor.data[rows], tensor.tensor_type).copy())
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise RefusalError(
                f"{self.path}: tensor '{name}' is {kind}, which the gguf package cannot dequantize", hint=_ELSEWHERE
            ) from None
        values = values.view(-1, *spec.shape[1:])
        if name.endswith("norm.weight") and self._described.norms_add:
            values = values - self._described.norms_add
        return _half_split(values, self.config[heads])[first : first + count] if heads else values


def _spec(tensor: Any) -> TensorSpec:
    """Return shape and dtype of a stored tensor; GGUF lists dimensions innermost first."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return TensorSpec(shape, _KEPT.get(tensor.tensor_type.name, _QUANTIZED))


def _contents(key: str, field: Any) -> Any:
    """Return a metadata value; for a vocabulary, which is long, only True."""
    is_list = len(field.data) > 1
    return True if is_list and key.startswith("tokenizer.") else field.contents()


def _shortest(value: float) -> float:
    """Return the shortest decimal with the same fp32 value, which is the one meant: GGUF stores 1e-5 as 9.999999747e-06."""
    import numpy

    return float(str(numpy.float32(value)))


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaved rotary order: rows (0, 1), (2, 3), ... of a head of h rows become (0, h/2), (1, h/2+1), ..."""
    return weight.view(heads, len(weight) // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
