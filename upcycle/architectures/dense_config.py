"""A dense model's configuration, read out with its defaults, and the features of it that not every target can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from upcycle.ffn.form import FfnForm


class Feature(Enum):
    """A feature that a dense model or a blueprint needs, and that a target may be unable to hold."""

    PLAIN_QUERIES = "queries and keys without norms"
    QUERY_NORMS = "per-head query and key norms"
    ROTATED_QUERY_NORMS = "per-head query and key norms after the rotation"
    FULL_QUERY_NORMS = "query and key norms over all heads"
    QKV_BIAS = "biases on the q, k and v projections"
    OUTPUT_BIAS = "a bias on the attention output projection only"
    ATTENTION_BIAS = "biases on the q, k and v projections, a bias on the attention output projection"
    MLP_BIAS = "biases in the FFN"
    UNGATED_FFN = "an FFN without a gate"
    WINDOW = "a sliding window on every layer"
    MIXED_WINDOWS = "sliding windows on some layers only"
    PARTIAL_ROTARY = "a rotary embedding of a part of each head"
    MULTIPLIERS = "multipliers on embeddings, attention scores or residuals"
    LOGIT_SCALE = "scaled logits"
    SCALED_ROPE = "a rotary embedding that is neither plain nor scaled by one factor"
    LAYER_NORMS = "LayerNorms instead of RMSNorms"
    IMAGE_SCALE = "images beside embeddings that are multiplied or lose their means"
    BARE_LAYER_NORMS = "LayerNorms without weights and biases"
    POST_NORMS = "norms behind attention and FFN instead of before them"
    PARALLEL_BLOCK = "attention and FFN side by side behind one LayerNorm"
    CONVOLUTIONS = "short convolutions in place of some attention layers"
    GATED_ATTENTION = "gated attention between linear attention layers"
    LAYER_ROPES = "layers without rotary position embedding (NoPE), or with another theta than the rest"
    SINKS = "attention sinks"
    GROWING_SCORES = "attention scores that grow behind the length that the model was first trained with"
    LATENT_ATTENTION = "latent attention (MLA)"
    ACTIVATION = "an activation that is not SiLU"
    SHARED_EXPERTS = "shared experts"
    DENSE_FIRST = "dense layers before the MoE layers"
    DENSE_LAYERS = "dense layers between MoE layers"


_OTHER_QUERIES = {
    Feature.ROTATED_QUERY_NORMS,
    Feature.FULL_QUERY_NORMS,
    Feature.CONVOLUTIONS,
    Feature.GATED_ATTENTION,
    Feature.LATENT_ATTENTION,
}


@dataclass(frozen=True)
class FfnSize:
    """What :class:`DenseConfig` says of one layer's FFN."""

    hidden_size: int
    intermediate_size: int
    hidden_act: str
    mlp_bias: bool
    mlp_gated: bool
    output_size: int | None = None


@dataclass(frozen=True)
class DenseConfig:
    """Holds a dense model's ``config.json``, read out with the defaults of its stock transformers class.

    The four multipliers apply to embeddings, to attention scores (None: one over the square root of the head size), to what a
    block adds to the stream, and to logits, which stay below ``logits_cap`` where there is one. ``special`` are features of the
    block that only related architectures have, and
    ``extra`` the configuration keys that come with them. ``raw`` is the file's content, for a target that keeps all of it.
    Where FFNs are not all of one size and form, ``ffns`` has those of every layer, and the other fields those of the first.
    ``output_size`` is the length of an FFN's output where that is not ``hidden_size``: a connector leads from one stream to another.
    """

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
    thetas: tuple[
        float, ...
    ] = ()  # theta of every layer's rotary embedding, 0: none; empty: all are as rope_parameters say
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    mlp_gated: bool = True
    query_norms: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_cap: float | None = None
    special: frozenset[Feature] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    ffns: tuple[FfnSize, ...] = ()
    output_size: int | None = None

    def at(self, layer: int) -> DenseConfig:
        """Return the configuration with the sizes and form of one layer's FFN."""
        return replace(self, ffns=(), **vars(self.ffns[layer])) if self.ffns else self

    @property
    def ffn_output(self) -> int:
        """The length of an FFN's output."""
        return self.hidden_size if self.output_size is None else self.output_size

    @property
    def attention_scale(self) -> float:
        """The factor on query-key products."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def rotated_dim(self) -> int:
        """How many dimensions of every head the rotary embedding turns."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1))

    @property
    def window(self) -> int | None:
        """The sliding window, in tokens, of the layers that have one; None where no layer has one."""
        return next((window for window in self.windows if window is not None), None)

    @property
    def layer_thetas(self) -> list[float]:
        """The theta of the rotary embedding of every layer; 0: it has none."""
        return list(self.thetas) or [self.rope_parameters.get("rope_theta", 0.0)] * self.num_hidden_layers

    def settings(self, feature: Feature) -> dict[str, Any]:
        """Return the configuration keys that turn a feature on, with their values, for the message of a refusal."""
        biases = {"attention_bias": self.qkv_bias or self.output_bias}
        multipliers = {
            "embedding_multiplier": self.embedding_multiplier,
            "attention_multiplier": self.attention_scale,
            "residual_multiplier": self.residual_multiplier,
        }
        keys: dict[Feature, dict[str, Any]] = {
            Feature.QKV_BIAS: biases,
            Feature.OUTPUT_BIAS: biases,
            Feature.ATTENTION_BIAS: biases,
            Feature.MLP_BIAS: {"mlp_bias": self.mlp_bias},
            Feature.ACTIVATION: {"hidden_act": self.hidden_act},
            Feature.WINDOW: {"sliding_window": self.window},
            Feature.MIXED_WINDOWS: {"sliding_window": self.window},
            Feature.PARTIAL_ROTARY: {"partial_rotary_factor": self.rope_parameters.get("partial_rotary_factor")},
            Feature.SCALED_ROPE: {"rope_type": self.rope_parameters.get("rope_type")},
            Feature.MULTIPLIERS: multipliers,
            Feature.LAYER_ROPES: {"layers without": self.layer_thetas.count(0)},
            Feature.LOGIT_SCALE: {"logits multiplier": self.logits_multiplier},
        }
        return keys.get(feature, {})

    @property
    def ffn_form(self) -> FfnForm:
        """The projections and biases of an FFN, which has biases on all of its projections or on none."""
        form = FfnForm(self.hidden_act, self.mlp_gated)
        return replace(form, biases=frozenset(form.matrices)) if self.mlp_bias else form

    @property
    def layer_types(self) -> list[str]:
        """The value of ``layer_types`` as most configuration classes take it."""
        return ["full_attention" if window is None else "sliding_attention" for window in self.windows]

    @property
    def features(self) -> frozenset[Feature]:
        """The features that a target must hold to reproduce this model's attention and FFN."""
        kinds = set(self.windows)
        plain_scores = math.isclose(self.attention_scale, self.head_dim**-0.5, rel_tol=1e-9)
        multiplied = self.embedding_multiplier != 1 or self.residual_multiplier != 1 or not plain_scores
        present = {
            Feature.PLAIN_QUERIES: not self.query_norms and not self.special & _OTHER_QUERIES,
            Feature.QUERY_NORMS: self.query_norms,
            Feature.QKV_BIAS: self.qkv_bias and not self.output_bias,
            Feature.OUTPUT_BIAS: self.output_bias and not self.qkv_bias,
            Feature.ATTENTION_BIAS: self.qkv_bias and self.output_bias,
            Feature.MLP_BIAS: self.mlp_bias,
            Feature.UNGATED_FFN: not self.mlp_gated,
            Feature.WINDOW: len(kinds) == 1 and None not in kinds,
            Feature.MIXED_WINDOWS: len(kinds) > 1,
            Feature.PARTIAL_ROTARY: self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0
            and Feature.GATED_ATTENTION not in self.special,
            Feature.MULTIPLIERS: multiplied,
            Feature.LAYER_ROPES: bool(set(self.thetas) - {self.rope_parameters.get("rope_theta")}),
            Feature.LOGIT_SCALE: self.logits_multiplier != 1,
        }
        return self.special | {feature for feature, is_present in present.items() if is_present}
