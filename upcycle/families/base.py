"""What the rest of the tool knows about a dense architecture: its read-out configuration and where its tensors are."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from upcycle.errors import CheckpointError, RefusalError
from upcycle.tensor_files import TensorSpec


class Feature(Enum):
    """Something a dense model or a blueprint needs and a target may be unable to hold."""

    PLAIN_QUERIES = "queries and keys without norms"
    QUERY_NORMS = "per-head query and key norms"
    QKV_BIAS = "biases on the q, k and v projections"
    OUTPUT_BIAS = "a bias on the attention output projection"
    MLP_BIAS = "biases in the FFN"
    WINDOW = "a sliding window on every layer"
    MIXED_WINDOWS = "sliding windows on some layers only"
    SHARED_EXPERTS = "shared experts"
    DENSE_LAYERS = "dense layers between MoE layers"


@dataclass(frozen=True)
class DenseConfig:
    """A dense model's ``config.json``, read out with the defaults of its stock transformers class."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    initializer_range: float
    attention_dropout: float
    tie_word_embeddings: bool
    rope_parameters: Mapping[str, Any]
    token_ids: Mapping[str, Any]
    dtype: str | None
    windows: tuple[int | None, ...]  # sliding window of every layer; None attends to everything
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_norms: bool = False

    @property
    def features(self) -> frozenset[Feature]:
        """What a target must hold to reproduce this model's attention and FFN."""
        kinds = set(self.windows)
        present = {
            Feature.PLAIN_QUERIES: not self.query_norms,
            Feature.QUERY_NORMS: self.query_norms,
            Feature.QKV_BIAS: self.qkv_bias,
            Feature.OUTPUT_BIAS: self.output_bias,
            Feature.MLP_BIAS: self.mlp_bias,
            Feature.WINDOW: len(kinds) == 1 and None not in kinds,
            Feature.MIXED_WINDOWS: len(kinds) > 1,
        }
        return frozenset(feature for feature, is_present in present.items() if is_present)


class Family(ABC):
    """A dense architecture. Subclasses state the stock defaults of their configuration class and override what differs.

    ``defaults`` holds the value that transformers' class takes when ``config.json`` lacks the key: a wrong default is
    a silent error, so a contract test compares every one with the class itself.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]  # preferred first
    elsewhere: ClassVar[Mapping[Feature, str]] = {}  # feature -> which target could hold it, for refusals
    defaults: ClassVar[Mapping[str, Any]]

    def config(self, raw: Mapping[str, Any]) -> DenseConfig:
        """Read out ``config.json``.

        Raises:
            RefusalError: the configuration asks for something no target can hold.
            CheckpointError: a size is not a positive integer.
        """
        _refuse_unheld(raw)
        values = {**self.defaults, **{key: raw[key] for key in self.defaults if raw.get(key) is not None}}
        for key in _SIZES:
            if not isinstance(values[key], int) or values[key] < 1:
                raise CheckpointError(f"config.json: '{key}' must be a positive integer, got {values[key]!r}")
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        return DenseConfig(
            family=self.name,
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values["num_key_value_heads"] or heads,
            head_dim=values.get("head_dim") or hidden // heads,
            vocab_size=values["vocab_size"],
            hidden_act=values["hidden_act"],
            rms_norm_eps=values["rms_norm_eps"],
            max_position_embeddings=values["max_position_embeddings"],
            initializer_range=values["initializer_range"],
            attention_dropout=values["attention_dropout"],
            tie_word_embeddings=values["tie_word_embeddings"],
            rope_parameters=rope_parameters(raw),
            token_ids={key: raw.get(key, self.token_defaults.get(key)) for key in _TOKEN_IDS},
            dtype=raw.get("dtype") or raw.get("torch_dtype"),
            windows=self.windows(raw, values["num_hidden_layers"]),
            **self.attention(raw),
        )

    token_defaults: ClassVar[Mapping[str, Any]] = {}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Sliding window of every layer."""
        return (None,) * layers

    def attention(self, raw: Mapping[str, Any]) -> dict[str, bool]:
        """Which biases and norms the layers have, as keyword arguments of DenseConfig."""
        return {}

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Names of the tensors of one dense FFN: ``gate`` and ``up`` ``[F, d]``, ``down`` ``[d, F]``, its input ``norm`` ``[d]``."""
        prefix = f"model.layers.{layer}"
        names = {part: f"{prefix}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        return {**names, "norm": f"{prefix}.post_attention_layernorm.weight"}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of everything in one decoder layer but its FFN."""
        d, head = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,)}
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{part}_proj.weight"] = (rows, d)
            if config.qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (rows,)
        shapes["self_attn.o_proj.weight"] = (d, q)
        if config.output_bias:
            shapes["self_attn.o_proj.bias"] = (d,)
        if config.query_norms:
            shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        shapes["post_attention_layernorm.weight"] = (d,)
        return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}

    def ffn_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the three matrices (and biases) of one dense FFN."""
        d, width, names = config.hidden_size, config.intermediate_size, self.ffn_names(layer)
        shapes: dict[str, tuple[int, ...]] = {
            names["gate"]: (width, d),
            names["up"]: (width, d),
            names["down"]: (d, width),
        }
        if config.mlp_bias:  # known, so that the refusal names the feature and not a stray tensor
            shapes |= {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
        return shapes

    def first_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """What comes before the layers."""
        return {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}

    def last_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """What comes after the layers."""
        head = {} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, config.hidden_size)}
        return {"model.norm.weight": (config.hidden_size,), **head}

    def check(self, config: DenseConfig, specs: Mapping[str, TensorSpec], where: str) -> None:
        """Compare a checkpoint's tensors with what its configuration promises.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape; names it.
        """
        expected = {**self.first_specs(config), **self.last_specs(config)}
        for layer in range(config.num_hidden_layers):
            expected |= self.layer_specs(config, layer) | self.ffn_specs(config, layer)
        for name, shape in expected.items():
            if name not in specs:
                raise CheckpointError(
                    f"{where}: tensor '{name}' is missing",
                    hint="compare config.json with the weights: do they belong together?",
                )
            if specs[name].shape != shape:
                raise CheckpointError(
                    f"{where}: tensor '{name}' has shape {list(specs[name].shape)}, config.json says {list(shape)}",
                    hint="compare config.json with the weights: do they belong together?",
                )
        leftover = sorted(set(specs) - set(expected) - {"lm_head.weight"})
        leftover = [name for name in leftover if not name.endswith("rotary_emb.inv_freq")]
        if leftover:
            raise CheckpointError(
                f"{where}: tensor '{leftover[0]}' is not part of a {self.name} model and would be lost"
                + (f" ({len(leftover)} such tensors)" if len(leftover) > 1 else ""),
                hint="biases must be declared in config.json (attention_bias, mlp_bias); adapters must be merged first",
            )


def _refuse_unheld(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unknown method")
        raise RefusalError(
            f"config.json: the weights are quantized ({method})", hint="convert the full-precision checkpoint instead"
        )
    if not all(raw.get("no_rope_layers") or [True]):
        raise RefusalError(
            "config.json: 'no_rope_layers' asks for layers without rotary position embedding (NoPE), "
            "and no stock MoE architecture can skip it"
        )


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The whole rope description, from today's ``rope_parameters`` or the older ``rope_theta`` + ``rope_scaling``.

    All four families default to theta 10,000; some MoE classes do not, so it is always written out.
    """
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise RefusalError("config.json: 'rope_parameters' differ per layer type, and no target here can hold that")
    rope.setdefault("rope_theta", float(raw.get("rope_theta") or 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1.0):
        raise RefusalError(
            "config.json: 'partial_rotary_factor' is below 1; glm4_moe could hold that, this version does not write it"
        )
    return rope
