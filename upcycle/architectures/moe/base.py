"""The description of a MoE architecture: how it stores a layer, as plain data to write tensors, to plan them and to read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.rope import can_be_masked, masked_rope, partly_turned
from upcycle.architectures.tensor_origin import Origin, is_rotated, pairs
from upcycle.errors import RefusalError
from upcycle.ffn.moe_shape import MoeShape, Part
from upcycle.ffn.shared_switch import switch_dtype

if TYPE_CHECKING:
    from upcycle.ffn.expert_tensors import ExpertTensors
    from upcycle.ffn.gated_experts import BuildsParts

ExpertLayout = Literal["per-expert", "fused"]
Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class OutputTensor:
    """Describes a tensor on disk: its parts, one after another along the first dimension (or a new one), fill its shape.

    ``dtype`` is set where the stock class keeps the tensor in another dtype than the experts.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtype: str | None = None

    def stored_dtype(self, experts: str) -> str:
        """Return the dtype in which it is written beside experts of a dtype."""
        if any(part.kind == "shared_switch" for part in self.parts):
            return self.dtype or switch_dtype(experts)
        return self.dtype or experts


_WINDOWS = frozenset({Feature.WINDOW, Feature.MIXED_WINDOWS})


class Target(ABC):
    """Describes a stock MoE architecture of transformers.

    Attributes:
        name: its ``model_type``.
        title: its name in prose.
        architecture: the class of its causal language model.
        holds: the features of dense models and blueprints that it can hold.
        router_semantics: how it turns logits into weights, in words.
        holds_unnormalized: whether the chosen experts' weights may stay as the softmax gives them.
        holds_rules: whether its router may have a hidden layer, and follow any routing rule that this version knows.
        top_k: the only number of experts per token that its router chooses; None: any.
        weight_of_chosen: what every chosen expert weighs, whatever the logits, unless two of them are equal; None: the router says.
        rotates_pairs: whether the rotary embedding turns rows 2i and 2i + 1, not i and i + head/2.
        masks_rotary: whether it may stop the rotation of a part of each head by factors.
        keeps_names: whether every tensor outside the FFNs keeps the name and form that it has in the dense model.
        module_paths: where its parts are.
        router: the module, in the block with the routed experts, that returns logits ``[T, E]``, weights ``[T, K]`` and experts
            ``[T, K]``.
        score: the function that turns logits into scores.
        shared: the module of the shared expert in that block; None: it has none.
        shared_switch: the module whose sigmoid multiplies the shared expert's output; None: it has none.
    """

    name: str
    title: str
    architecture: ClassVar[str]
    holds: frozenset[Feature]
    router_semantics: str
    holds_unnormalized: bool = False
    holds_rules: bool = False
    top_k: int | None = None
    weight_of_chosen: float | None = None
    rotates_pairs: bool = False
    masks_rotary: bool = False
    keeps_names: bool = False
    module_paths: ModulePaths = ModulePaths()
    router: str = "gate"
    score: Score = "softmax"
    shared: str | None = None
    shared_switch: str | None = None

    def of(self, family: Family) -> Target:
        """Return the target for models of one family: itself, where it is the same for all."""
        return self

    @abstractmethod
    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return the keys of ``config.json`` that only this architecture has."""

    @abstractmethod
    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return every tensor of one MoE block, experts in order."""

    @property
    def weight_sum(self) -> float:
        """What the chosen experts weigh together."""
        return 1.0 if self.weight_of_chosen is None or self.top_k is None else self.weight_of_chosen * self.top_k

    def layer_specs(self, family: Family, dense: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names (the family's) and shapes of one layer's tensors outside the FFN, with those that the family lacks."""
        return family.layer_specs(dense, layer)

    def last_specs(self, family: Family, dense: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names (the family's) and shapes of the tensors after the layers."""
        return family.last_specs(self.stored(dense))

    def stored_width(self, shape: MoeShape) -> int:
        """Return how many neurons an expert has on disk."""
        return shape.expert_size

    def built(self, tensors: ExpertTensors, dense: DenseConfig) -> BuildsParts:
        """Return what makes the parts of :meth:`moe_tensors` out of one layer's experts."""
        return tensors

    def folded(self, dense: DenseConfig) -> str | None:
        """Return what is folded into the experts, in words; their input then is not the dense FFN's. None: nothing is."""
        return None

    def centred(self, dense: DenseConfig) -> str | None:
        """Return what is taken off everything that adds to the stream, in words: outputs then differ from the dense by their means."""
        return None

    def origin(self, family: Family, dense: DenseConfig, name: str) -> Origin:
        """Return where a tensor outside the experts comes from, with its rows in the order that this architecture rotates.

        ``name`` is the family's; the tensor is written as ``family.module_paths.renamed(name, self.module_paths)``.
        """
        (embeddings,) = family.first_specs(dense)
        if dense.tie_word_embeddings and name == family.module_paths.head_weight:
            return family.origin(dense, embeddings)
        origin = family.origin(dense, name)
        if name == embeddings:
            stored = self.stored(dense)
            by = dense.residual_multiplier / stored.residual_multiplier
            return replace(origin, times=dense.embedding_multiplier / stored.embedding_multiplier / by)
        if name == family.module_paths.final_norm_weight:
            return replace(origin, times=dense.logits_multiplier / self.stored(dense).logits_multiplier)
        if is_rotated(name) and self.masks(dense):
            return origin.ordered(partly_turned(dense.rope_parameters, dense.head_dim))
        if is_rotated(name) and self.rotates_pairs:
            return origin.ordered(pairs(dense.head_dim, dense.rotated_dim))
        return origin

    def masks(self, dense: DenseConfig) -> bool:
        """Return whether a rotary embedding of a part of each head is written as one of whole heads that stops the rest.

        See :func:`~upcycle.architectures.rope.masked_rope`.
        """
        if not self.masks_rotary or Feature.PARTIAL_ROTARY not in dense.features - self.holds:
            return False
        even = not dense.head_dim % 2 and not dense.rotated_dim % 2
        return even and can_be_masked(dense.rope_parameters, dense.max_position_embeddings)

    def written(self, dense: DenseConfig, name: str) -> str:
        """Return the name under which a tensor of this architecture is written."""
        return name

    def stored(self, dense: DenseConfig) -> DenseConfig:
        """Return the dense configuration in terms that this architecture can express.

        An architecture without multipliers stores the embeddings multiplied; a head that was tied to them then has a tensor of
        its own. The last norm's weight has the logits' multiplier in it. One without windows leaves out a window as long as the
        context, which is never reached. Gated experts are squared ReLU without a gate where gate and up are equal:
        ``relu(up x) * up x``. Scores that grow behind some length are those of a model with a context of that length.
        """
        if Feature.GROWING_SCORES in dense.special - self.holds:
            dense = _within_first_length(dense)
        if not dense.features & _WINDOWS <= self.holds:
            context = dense.max_position_embeddings
            reached = tuple(None if window is None or window >= context else window for window in dense.windows)
            dense = replace(dense, windows=reached)
        if self.masks(dense):
            whole = masked_rope(dense.rope_parameters, dense.head_dim, dense.max_position_embeddings)
            dense = replace(dense, rope_parameters=whole)
        if dense.ffn_form.doubles and Feature.UNGATED_FFN not in self.holds:
            dense = replace(dense, hidden_act=dense.ffn_form.as_gated.activation, mlp_gated=True)
        if Feature.LOGIT_SCALE not in self.holds:
            dense = replace(dense, logits_multiplier=1.0)
        return dense if Feature.MULTIPLIERS in self.holds else _without_multipliers(dense)

    def remarks(self, dense: DenseConfig) -> list[str]:
        """Return what every user of a converted model should know, for the plan's warnings."""
        stored, found = self.stored(dense), []
        if stored.windows != dense.windows:
            found.append(
                f"the sliding window of {dense.window} is never reached within {dense.max_position_embeddings} positions and is "
                f"left out: {self.name} has none"
            )
        if stored.max_position_embeddings != dense.max_position_embeddings:
            found.append(
                f"{self.name} holds this model up to position {stored.max_position_embeddings:,}, behind which its attention "
                f"scores grow: its context is written as that, not as {dense.max_position_embeddings:,}"
            )
        if self.masks(dense):
            found.append(
                f"{self.name} rotates whole heads: factors of a longrope with theta 1 turn {dense.rotated_dim} dimensions of each "
                f"head as before and stop the other {dense.head_dim - dense.rotated_dim}. transformers and engines that apply "
                "longrope to any architecture run that"
            )
        if stored.mlp_gated and dense.ffn_form.doubles:
            found.append(
                f"{self.name} has gated experts: gate and up are both the dense up projection (squared ReLU is relu(x) * x), so "
                "that an expert has half as many weights again"
            )
        return found

    def lacks(self, dense: DenseConfig, more: Iterable[Feature] = ()) -> list[Feature]:
        """Return the features of a dense model, and of ``more`` that its conversion needs, that this architecture cannot hold."""
        needed = {*self.stored(dense).features, *more} - self.holds
        return [feature for feature in Feature if feature in needed]

    def full_config(self, dense: DenseConfig, shape: MoeShape, dtype: str) -> dict[str, Any]:
        """Return a complete ``config.json``, which leaves nothing to a default that could differ from the dense model's.

        ``rope_theta`` and ``rope_scaling`` repeat ``rope_parameters`` for loaders that predate transformers 5, which would
        otherwise fall back to a theta of their own and answer with garbage.
        """
        dense = self.stored(dense)
        rope = dict(dense.rope_parameters)
        older = {key: value for key, value in rope.items() if key != "rope_theta"}
        config = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "dtype": dtype,
            "hidden_size": dense.hidden_size,
            "num_hidden_layers": dense.num_hidden_layers,
            "num_attention_heads": dense.num_attention_heads,
            "num_key_value_heads": dense.num_key_value_heads,
            "head_dim": dense.head_dim,
            "vocab_size": dense.vocab_size,
            "hidden_act": dense.hidden_act,
            "rms_norm_eps": dense.rms_norm_eps,
            "max_position_embeddings": dense.max_position_embeddings,
            "initializer_range": dense.initializer_range,
            "attention_dropout": dense.attention_dropout,
            "tie_word_embeddings": dense.tie_word_embeddings,
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "use_cache": True,
            "num_experts_per_tok": shape.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            **dense.token_ids,
            **dense.extra,
            **self.config(dense, shape),
        }
        if rope["rope_type"] != "default":
            config["rope_scaling"] = older
        return config


def _within_first_length(dense: DenseConfig) -> DenseConfig:
    """Return the configuration of the same model up to the position from which on its attention scores grow."""
    rope = dict(dense.rope_parameters)
    length = min(dense.max_position_embeddings, rope["original_max_position_embeddings"])
    for key in ("llama_4_scaling_beta", "max_position_embeddings"):
        rope.pop(key, None)
    special = dense.special - {Feature.GROWING_SCORES}
    return replace(dense, max_position_embeddings=length, rope_parameters=rope, special=special)


def _without_multipliers(dense: DenseConfig) -> DenseConfig:
    """Return the configuration of the same model without multipliers on embeddings and residuals.

    Where every block adds ``m`` times its output, the stream is divided by ``m``: the embeddings are, blocks add their output as it
    is, and a norm of the stream is the same with an eps divided by ``m ** 2``. Norms of queries and keys have that eps, too, and their
    input is not the stream.
    """
    residual = dense.residual_multiplier
    if residual != 1 and dense.features & {Feature.QUERY_NORMS, Feature.ROTATED_QUERY_NORMS, Feature.FULL_QUERY_NORMS}:
        return dense
    if dense.embedding_multiplier != residual:
        dense = replace(dense, tie_word_embeddings=False)
    eps = dense.rms_norm_eps / residual**2
    return replace(dense, embedding_multiplier=1.0, residual_multiplier=1.0, rms_norm_eps=eps)


def expert_tensors(
    prefix: str, names: tuple[str, str, str], dense: DenseConfig, shape: MoeShape, layout: ExpertLayout
) -> list[OutputTensor]:
    """Return the routed experts' tensors below ``prefix``: one per expert and matrix, or fused as transformers 5 has them in memory.

    ``names`` are the per-expert names of gate, up and down. Fused: ``gate_up_proj [E, 2m, d]``, ``down_proj [E, d, m]``.
    """
    d, m = dense.hidden_size, shape.expert_size
    if layout == "fused":
        everyone = range(shape.experts)
        gate_up = tuple(Part(kind, e) for e in everyone for kind in ("gate", "up"))
        return [
            OutputTensor(f"{prefix}.gate_up_proj", (shape.experts, 2 * m, d), gate_up),
            OutputTensor(f"{prefix}.down_proj", (shape.experts, d, m), tuple(Part("down", e) for e in everyone)),
        ]
    gate, up, down = names
    return [
        tensor
        for e in range(shape.experts)
        for tensor in (
            OutputTensor(f"{prefix}.{e}.{gate}.weight", (m, d), (Part("gate", e),)),
            OutputTensor(f"{prefix}.{e}.{up}.weight", (m, d), (Part("up", e),)),
            OutputTensor(f"{prefix}.{e}.{down}.weight", (d, m), (Part("down", e),)),
        )
    ]


def router_tensor(name: str, dense: DenseConfig, shape: MoeShape) -> OutputTensor:
    """Return the tensor of the router's rows ``[E, d]``."""
    return OutputTensor(name, (shape.experts, dense.hidden_size), (Part("router"),))


def sink_tensors(prefix: str, dense: DenseConfig) -> list[OutputTensor]:
    """Return the attention sinks ``[heads]`` below ``prefix``, so low that they do nothing; none where the dense model has them.

    A sink adds ``exp(sink)`` to the sum of a softmax. ``exp(-1e4)`` is 0 in every dtype, and so is its gradient.
    """
    if Feature.SINKS in dense.special:
        return []
    heads = dense.num_attention_heads
    return [OutputTensor(f"{prefix}.sinks", (heads,), (Part("filled", factor=-1e4, size=heads),))]


def shared_parts(shape: MoeShape, idle_size: int, factor: float = 1.0) -> tuple[Part, Part, Part]:
    """Return gate, up and down of the shared experts, or of an idle expert of ``idle_size`` neurons, which adds nothing.

    An idle expert has a zero down projection; with zero gate and up rows instead, it could not learn.
    """
    if shape.shared:
        return Part("shared_gate"), Part("shared_up"), Part("shared_down", factor=factor)
    return Part("idle_gate", size=idle_size), Part("idle_up", size=idle_size), Part("idle_down", size=idle_size)


def gated_tensors(prefix: str, parts: tuple[Part, Part, Part], dense: DenseConfig, size: int) -> list[OutputTensor]:
    """Return the tensors of a gated FFN of ``size`` neurons below ``prefix``, under the usual names."""
    d, (gate, up, down) = dense.hidden_size, parts
    return [
        OutputTensor(f"{prefix}.gate_proj.weight", (size, d), (gate,)),
        OutputTensor(f"{prefix}.up_proj.weight", (size, d), (up,)),
        OutputTensor(f"{prefix}.down_proj.weight", (d, size), (down,)),
    ]


def refuse_unheld(
    target: Target, family: Family, dense: DenseConfig, more: Collection[Feature], others: Sequence[Target]
) -> None:
    """Refuse features that ``target`` cannot hold; the message names the feature, its keys, and a target that holds it.

    Args:
        target: the target.
        family: the dense architecture.
        dense: its configuration.
        more: features that the conversion needs beyond the dense model's.
        others: the targets that may be named instead.

    Raises:
        RefusalError: a feature is not held, or this pair of family and target is not tested.
    """
    lacking = target.lacks(dense, more)
    if not lacking:
        if target.name not in family.targets and not target.keeps_names:
            why = f": {family.unheld}" if family.unheld else ""
            raise RefusalError(
                f"{family.name} to {target.name} is not a conversion this version was tested with{why}",
                hint=f"use --target {family.targets[0]}; targets of {family.name}: {', '.join(family.targets)}",
            )
        return
    able = [other.name for other in others if not other.lacks(dense, more)]
    notes = [f"{feature.value}: {family.elsewhere[feature]}" for feature in lacking if feature in family.elsewhere]
    if able:
        hint = f"use --target {able[0]}"
    elif notes:
        hint = f"this version writes no target that can; elsewhere, {'; '.join(notes)}"
    elif len(others) > 1:
        short = (f"{other.name}: {', '.join(f.value for f in other.lacks(dense, more))}" for other in others)
        hint = f"this version writes no target that can hold all of it; what each lacks: {'; '.join(short)}"
    else:
        hint = "this version writes no target that can"
    keys = {feature: ", ".join(f"{k} {v}" for k, v in dense.settings(feature).items()) for feature in lacking}
    what = ", ".join(f"{feature.value} ({keys[feature]})" if keys[feature] else feature.value for feature in lacking)
    raise RefusalError(f"{target.name} cannot hold {what}, which this {family.name} conversion needs", hint=hint)
