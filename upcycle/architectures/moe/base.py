"""The description of a MoE architecture: how it stores a layer, as plain data to write tensors, to plan them and to read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.tensor_origin import Origin, is_rotated
from upcycle.errors import RefusalError
from upcycle.ffn.moe_shape import MoeShape, Part
from upcycle.ffn.shared_switch import switch_dtype

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
        rotates_pairs: whether the rotary embedding turns rows 2i and 2i + 1, not i and i + head/2.
        keeps_names: whether every tensor outside the FFNs keeps the name and form that it has in the dense model.
        note: what a user of its models must know.
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
    holds: ClassVar[frozenset[Feature]]
    router_semantics: ClassVar[str]
    holds_unnormalized: ClassVar[bool] = False
    rotates_pairs: ClassVar[bool] = False
    keeps_names: ClassVar[bool] = False
    note: ClassVar[str | None] = None
    module_paths: ModulePaths = ModulePaths()
    router: ClassVar[str] = "gate"
    score: ClassVar[Score] = "softmax"
    shared: ClassVar[str | None] = None
    shared_switch: ClassVar[str | None] = None

    def of(self, family: Family) -> Target:
        """Return the target for models of one family: itself, where it is the same for all."""
        return self

    @abstractmethod
    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return the keys of ``config.json`` that only this architecture has."""

    @abstractmethod
    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return every tensor of one MoE block, experts in order."""

    def origin(self, family: Family, dense: DenseConfig, name: str) -> Origin:
        """Return where a tensor outside the experts comes from, with its rows in the order that this architecture rotates.

        ``name`` is the family's; the tensor is written as ``family.module_paths.renamed(name, self.module_paths)``.
        """
        (embeddings,) = family.first_specs(dense)
        if dense.tie_word_embeddings and name == family.module_paths.head_weight:
            return family.origin(dense, embeddings)
        origin = family.origin(dense, name)
        if name == embeddings:
            return replace(origin, times=dense.embedding_multiplier / self.stored(dense).embedding_multiplier)
        return origin.ordered("pairs", dense.head_dim) if self.rotates_pairs and is_rotated(name) else origin

    def stored(self, dense: DenseConfig) -> DenseConfig:
        """Return the dense configuration in terms that this architecture can express.

        An architecture without multipliers stores the embeddings multiplied; a head that was tied to them then has a tensor of
        its own. One without windows leaves out a window as long as the context, which is never reached.
        """
        if not dense.features & _WINDOWS <= self.holds:
            context = dense.max_position_embeddings
            reached = tuple(None if window is None or window >= context else window for window in dense.windows)
            dense = replace(dense, windows=reached)
        if Feature.MULTIPLIERS in self.holds or dense.embedding_multiplier == 1:
            return dense
        return replace(dense, embedding_multiplier=1.0, tie_word_embeddings=False)

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
            raise RefusalError(
                f"{family.name} to {target.name} is not a conversion this version was tested with",
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
