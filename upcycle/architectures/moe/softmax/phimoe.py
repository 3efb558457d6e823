"""Phi-3.5-MoE: LayerNorms with biases, biases on all projections of attention, two experts per token by SparseMixer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target, expert_tensors
from upcycle.architectures.rope import masked_rope, partly_turned
from upcycle.architectures.tensor_origin import Origin, is_rotated
from upcycle.errors import RefusalError
from upcycle.ffn.gated_experts import BuildsParts, ConstantInput, GatedExperts
from upcycle.ffn.moe_shape import MoeShape, Part

if TYPE_CHECKING:
    from upcycle.ffn.expert_tensors import ExpertTensors

_LAYER_NORMS = {Feature.LAYER_NORMS, Feature.BARE_LAYER_NORMS}
_PLAIN = ("default", "linear")  # kinds of rope whose frequencies do not depend on the length of the input


class PhiMoe(Target):
    """Routes each token to two experts, whose weights are both 1 (``router_jitter_noise`` 0), so down projections are halved.

    The first is the largest logit, the second the largest of the others. Each one's weight is a softmax over the logits within
    ``2 * router_jitter_noise`` of it, relative to it: with 0 only equal logits share. Three things follow.

    - Such a router gets no gradient, in training mode either: the weights are constant (SparseMixer's estimate multiplies
      ``1 - softmax``, which is 0). It learns with the 0.01 of Phi-3.5-MoE, which is not the dense function any more.
    - Where two of the best logits are equal, a chosen expert weighs 1/2. In fp32 that happens to one token in ten
      million; bfloat16 has few digits, and loses a quarter of the FFN for a few tokens in a thousand per layer.
    - Engines compute another function: vLLM fixes the noise at 0.01, and silu; llama.cpp has RMSNorms, and normalises the weights.

    Everything else that its dense relatives have is expressed by weights. FFNs without a gate and biases are folded into gated
    experts by a constant direction of the LayerNorm's output (:mod:`~upcycle.ffn.gated_experts`); partial rotary embeddings by
    ``longrope`` factors that stop the others (:func:`~upcycle.architectures.rope.masked_rope`); missing biases and norms are
    written as zeros and ones. All biases are always written, since vLLM's class always has them.
    """

    name, title, architecture = "phimoe", "Phi-3.5-MoE", "PhimoeForCausalLM"
    holds = frozenset({Feature.PLAIN_QUERIES, Feature.ATTENTION_BIAS, Feature.WINDOW, *_LAYER_NORMS})
    router_semantics = "top-2 of the logits, both weights 1 (SparseMixer without jitter)"
    top_k = 2
    weight_of_chosen = 1.0
    router = "router"

    def stored(self, dense: DenseConfig) -> DenseConfig:
        """Return the configuration as this class has it: all biases, gated experts without biases, whole heads rotated."""
        dense = super().stored(dense)
        if not dense.special & _LAYER_NORMS:
            return dense
        form = dense.ffn_form.as_gated
        dense = replace(
            dense, qkv_bias=True, output_bias=True, mlp_bias=False, mlp_gated=True, hidden_act=form.activation
        )
        if dense.rope_parameters["rope_type"] not in _PLAIN:
            return dense
        rope = masked_rope(dense.rope_parameters, dense.head_dim, dense.max_position_embeddings)
        return replace(dense, rope_parameters=rope)

    def lacks(self, dense: DenseConfig, more: Iterable[Feature] = ()) -> list[Feature]:
        """Return the features that it cannot hold, a rotary embedding that depends on the length of the input among them."""
        scaled = dense.rope_parameters["rope_type"] not in _PLAIN
        return super().lacks(dense, [*more, Feature.SCALED_ROPE] if scaled else more)

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``intermediate_size`` is the width of one expert."""
        return {
            "intermediate_size": self.stored_width(shape),
            "num_local_experts": shape.experts,
            "sliding_window": dense.windows[0],
            "router_jitter_noise": 0.0,
            "input_jitter_noise": 0.0,
            "attention_bias": True,
            "lm_head_bias": True,
        }

    def stored_width(self, shape: MoeShape) -> int:
        """Return an expert's neurons, with those that hold the down bias."""
        return shape.form.width_as_gated(shape.expert_size)

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, then w1 (gate), w3 (up) and w2 (down) of each expert, with down projections halved."""
        paths, size = self.module_paths, self.stored_width(shape)
        fused = layout == "fused"
        prefix = paths.block_of(layer) if fused else f"{paths.layer(layer)}.block_sparse_moe"
        router = f"{prefix}.router.weight" if fused else f"{prefix}.gate.weight"
        stored = replace(shape, expert_size=size)
        experts = expert_tensors(f"{prefix}.experts", ("w1", "w3", "w2"), dense, stored, layout)
        return [
            OutputTensor(router, (shape.experts, dense.hidden_size), (Part("router"),)),
            *(replace(tensor, parts=tuple(self._sized(part, size) for part in tensor.parts)) for tensor in experts),
        ]

    def _sized(self, part: Part, size: int) -> Part:
        return replace(part, size=size, factor=1 / self.weight_sum if part.kind == "down" else 1.0)

    def built(self, tensors: ExpertTensors, dense: DenseConfig) -> BuildsParts:
        """Return the experts as gated ones.

        Raises:
            RefusalError: two rows of the router are equal, so that their logits would be, for every token.
        """
        rows = tensors.blueprint.router
        assert rows is not None
        if len(rows.to(tensors.ffn.dtype).unique(dim=0)) < len(rows):
            raise RefusalError(
                f"layer {tensors.ffn.layer}: two rows of the router are equal, and {self.name} halves the weight of an expert whose "
                "logit another one has, too",
                hint="--router random",
            )
        return GatedExperts(tensors)

    def folded(self, dense: DenseConfig) -> str | None:
        """Name the norm and what else goes into the experts, where the dense FFN needs a constant input."""
        form = dense.ffn_form
        if not form.needs_constant:
            return None
        return "the norm before the FFN and its biases" if form.biases else "the norm before the FFN"

    def remarks(self, dense: DenseConfig) -> list[str]:
        """Say what the router's constant weights mean for training, for bfloat16 and for engines."""
        found = [
            "phimoe: with router_jitter_noise 0, which keeps the dense function, both experts always weigh 1, and no loss on the "
            "tokens reaches the router: train it with 0.01 (not the dense function then), or train the experts alone",
            "phimoe: an expert whose logit another one equals weighs 1/2. In bfloat16 that takes a quarter of the FFN from "
            "some tokens of every layer, in float16 from fewer, in float32 from hardly any",
        ]
        act = self.stored(dense).hidden_act
        also = "" if act == "silu" else f" and computes silu whatever hidden_act says ({act})"
        engines = f"phimoe: vLLM fixes router_jitter_noise at 0.01{also}, llama.cpp normalises the weights: run it with transformers"
        gates = (
            "phimoe: its experts have gates, which the dense FFN has not: 1.5x the products of as many of its neurons"
        )
        return [*super().remarks(dense), *found, engines, *([] if dense.mlp_gated else [gates])]

    def layer_specs(self, family: Family, dense: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the family's tensors, and all weights and biases that this class has besides."""
        prefix, d = family.module_paths.layer(layer), dense.hidden_size
        q, kv = dense.num_attention_heads * dense.head_dim, dense.num_key_value_heads * dense.head_dim
        rows = {"q": q, "k": kv, "v": kv, "o": d}
        own = {f"self_attn.{part}_proj.bias": (size,) for part, size in rows.items()}
        own |= {f"{norm}.{kind}": (d,) for norm in _NORMS for kind in ("weight", "bias")}
        return {**family.layer_specs(dense, layer), **{f"{prefix}.{name}": shape for name, shape in own.items()}}

    def last_specs(self, family: Family, dense: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the family's tensors, and the final norm's weight and bias, and the head's bias."""
        paths, d = family.module_paths, dense.hidden_size
        norm = {f"{paths.final_norm}.{kind}": (d,) for kind in ("weight", "bias")}
        return {**super().last_specs(family, dense), **norm, f"{paths.head}.bias": (dense.vocab_size,)}

    def origin(self, family: Family, dense: DenseConfig, name: str) -> Origin:
        """Return where a tensor outside the experts comes from: a norm of ones or a bias of zeros where the family has none."""
        layer = family.module_paths.layer_of(name)
        stored = family.last_specs(dense) if layer is None else family.layer_specs(dense, layer)
        needed = self.last_specs(family, dense) if layer is None else self.layer_specs(family, dense, layer)
        before_ffn = ".post_attention_layernorm." in name and self.folded(dense) is not None
        embeddings = family.module_paths.embedding_weight
        if name != embeddings and (name not in stored or before_ffn):
            value = 1.0 if name.endswith("weight") else 0.0
            if before_ffn and name.endswith("bias"):
                value = ConstantInput(dense.hidden_size).level
            return Origin(embeddings, filled=(needed[name], value))
        origin = super().origin(family, dense, name)
        places = partly_turned(dense.rope_parameters, dense.head_dim)
        return origin.ordered(places) if places and is_rotated(name) else origin


_NORMS = ("input_layernorm", "post_attention_layernorm")
