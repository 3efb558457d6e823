"""Describes stock MoE architectures as sources: which keys count their experts, and which tensors hold each expert."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from upcycle.architectures.expert_terms import ExpertTerms, LayerCut, Term
from upcycle.architectures.fused_form import PLAIN, FusedForm, clamped_form
from upcycle.architectures.module_paths import (
    BELONG_TOGETHER,
    ModulePaths,
    check_layers,
    find_module_paths,
    module_paths_of,
    text_config,
)
from upcycle.architectures.moe_families import MoeFamily, moe_family
from upcycle.architectures.stock import build_config
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.tensor_spec import TensorSpec

Role = Literal["expert", "experts", "expert biases", "router", "router bias", "bias", "other"]


SPARSE_MIXED = 2  # experts that SparseMixer chooses
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_EXPERTS = re.compile(r".+\.(experts\.gate_up_proj|experts\.down_proj|block_sparse_moe\.(input|output)_linear\.weight)")
_BIASES = re.compile(r".+\.experts\.(gate_up|down)_proj_bias")
_ROUTER_BIAS = re.compile(r".+\.mlp\.router\.bias")
_ROUTER = re.compile(r".+\.(mlp|block_sparse_moe|feed_forward)\.((gate|gate\.wg|router|router\.layer)\.weight)")
_BIAS = re.compile(r".+\.((gate|mlp|block_sparse_moe|moe_statics)\.e_score_correction_bias|feed_forward\.expert_bias)")
_MATRICES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


@dataclass(frozen=True)
class ExpertRows(Origin):
    """The origin of a tensor whose first dimension counts experts: the experts ``taken`` are written, in that order.

    Normal noise, ``noise`` times the tensor's standard deviation, is added to all but the first ``kept`` of them. ``flat``: the
    stored tensor has a dimension of size 1 before that of the experts, and the written one has it, too (row), or not (vector).
    ``form`` is that of a tensor of all experts' matrices.
    """

    taken: tuple[int, ...] = ()
    kept: int = 0
    noise: float = 0.0
    seed: int = 0
    flat: Literal["", "row", "vector"] = ""
    form: FusedForm = PLAIN

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the written tensor."""
        count = len(self.taken)
        return {"": (count, *stored[1:]), "row": (1, count), "vector": (count,)}[self.flat]


@dataclass(frozen=True)
class MoeModel:
    """Describes a MoE by its ``config.json`` and its tensors' headers.

    ``normalized`` says that the chosen experts' weights sum to 1. ``context`` is the longest input in tokens.
    """

    family: MoeFamily
    raw: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    experts: int
    top_k: int
    normalized: bool
    layers: int
    vocab_size: int
    hidden_size: int
    context: int
    tied: bool

    @classmethod
    def read(cls, raw: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: str) -> MoeModel:
        """Read a configuration with the defaults of its stock class.

        Raises:
            RefusalError: it is not a MoE of a known architecture, or its experts cannot be copied one by one.
            CheckpointError: the stock class would refuse a value.
        """
        family = moe_family(raw, where)
        whole = build_config(raw, where)
        own, stock = family.text(raw), text_config(whole)
        if "num_hidden_layers" in own:
            check_layers(own["num_hidden_layers"], specs, _paths(family, whole), where)
        experts: Any = getattr(stock, family.experts_key, None)
        top_k: Any = getattr(stock, family.top_k_key, None)
        for key, value in ((family.experts_key, experts), (family.top_k_key, top_k)):
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{where}: config.json: '{key}' must be a positive integer, got {value!r}")
        if family.sparse_mixer and top_k != SPARSE_MIXED:
            raise CheckpointError(
                f"{where}: config.json: '{family.top_k_key}' is {top_k}, and a {family.name} router always chooses {SPARSE_MIXED}"
            )
        model = cls(
            family=family,
            raw=raw,
            specs=specs,
            experts=experts,
            top_k=top_k,
            # Cohere's softmax is that of the chosen logits alone, whatever the key says.
            normalized=family.normalized
            if family.normalized is not None
            else getattr(stock, "expert_selection_fn", "") == "softmax" or bool(getattr(stock, "norm_topk_prob", True)),
            layers=stock.num_hidden_layers,
            vocab_size=stock.vocab_size,
            hidden_size=stock.hidden_size,
            context=stock.max_position_embeddings,
            tied=bool(whole.tie_word_embeddings),
        )
        model.__dict__["stock"] = stock  # it takes long to build
        return model

    @property
    def sigmoid(self) -> bool:
        """Whether scores are sigmoids of the logits; Cohere's configuration says which."""
        return self.family.sigmoid or self.raw.get("expert_selection_fn") == "sigmoid"

    @cached_property
    def groups(self) -> int:
        """How many groups of as many experts, one after another, a router chooses among first."""
        greedy = getattr(self.stock, "topk_method", "") == "greedy"
        return 1 if greedy else int(getattr(self.stock, "n_group", 1) or 1)

    @property
    def jitter(self) -> float | None:
        """SparseMixer's noise, which tells how near a logit must be to share a weight; None: routers have no SparseMixer."""
        return float(self.stock.router_jitter_noise) if self.family.sparse_mixer else None

    @property
    def clamp(self) -> tuple[float, float] | None:
        """Of GPT-OSS's activation, the factor inside the sigmoid and the largest number; None: experts have another one."""
        return (float(self.stock.swiglu_alpha), float(self.stock.swiglu_limit)) if self.family.clamped else None

    @cached_property
    def stock(self) -> Any:
        """The stock configuration; of a model of parts, that of its text model."""
        return text_config(build_config(self.raw, self.family.name))

    @property
    def activation(self) -> str:
        """The activation of the experts, as stock configurations name it; classes without the key (LFM2) have SiLU."""
        return str(getattr(self.stock, "hidden_act", "silu"))

    @cached_property
    def module_paths(self) -> ModulePaths:
        """The paths of the parts in the stock class."""
        return _paths(self.family, build_config(self.raw, self.family.name) if self.family.parts else None)

    @cached_property
    def names(self) -> dict[int | None, list[str]]:
        """The names of the tensors of each layer (None: outside the layers).

        A stored copy of a tied head and inverse frequencies are left out.
        """
        found: dict[int | None, list[str]] = {None: []}
        for name in sorted(self.specs, key=_natural):
            if name.endswith("rotary_emb.inv_freq") or (self.tied and name == self.module_paths.head_weight):
                continue
            found.setdefault(self.module_paths.layer_of(name), []).append(name)
        return found

    def role(self, name: str) -> Role:
        """Return what a tensor holds: a matrix of one expert or of all, or these's biases, the router's rows, what is added to its
        logits, what is added for the choice alone, or anything else.
        """
        if self.module_paths.layer_of(name) is None:
            return "other"
        if _EXPERT.fullmatch(name):
            return "expert"
        tall = tuple(self.specs[name].shape[:1]) == (self.experts,) or self.is_flat(name)
        kinds: tuple[tuple[re.Pattern[str], Role], ...] = (
            *((_EXPERTS, "experts"), (_BIASES, "expert biases"), (_ROUTER, "router")),
            *((_ROUTER_BIAS, "router bias"), (_BIAS, "bias")),
        )
        return next((role for pattern, role in kinds if tall and pattern.fullmatch(name)), "other")

    def is_flat(self, name: str) -> bool:
        """Return whether a tensor holds a number per expert behind a dimension of size 1, as ERNIE's biases on the choice."""
        return tuple(self.specs[name].shape) == (1, self.experts)

    @cached_property
    def moe_layers(self) -> list[int]:
        """The layers that have a router, ascending."""
        return sorted(
            layer for layer, names in self.names.items() if layer is not None and "router" in map(self.role, names)
        )

    @property
    def biased(self) -> bool:
        """Whether routers have a bias that is added to the scores for the choice."""
        return any(self.role(name) == "bias" for layer in self.moe_layers for name in self.names[layer])

    @property
    def expert_elements(self) -> int:
        """The number of parameters in all routed experts of all layers."""
        held = ("expert", "experts", "expert biases")
        return sum(self.specs[name].elements for name in self.specs if self.role(name) in held)

    def origins(self, layer: int, taken: Sequence[int], noise: float, seed: int) -> Iterator[tuple[str, Origin]]:
        """Yield the names and origins of the tensors of a layer that has the experts ``taken`` of this model's layer.

        The first of ``taken`` are all experts of this layer, and keep their places.
        """
        places: dict[int, list[int]] = {}
        for place, expert in enumerate(taken):
            places.setdefault(expert, []).append(place)
        for name in self.names[layer]:
            role, match = self.role(name), _EXPERT.fullmatch(name)
            if role == "expert" and match:
                prefix, index, matrix = match.groups()
                for place in places[int(index)]:
                    yield f"{prefix}.{place}.{matrix}.weight", Origin(name)
            elif role == "other":
                yield name, Origin(name)
            else:
                drawn = noise if role == "router" else 0.0
                rows = ExpertRows(name, taken=tuple(taken), kept=self.experts, noise=drawn, seed=seed)
                yield name, replace(rows, flat="row" if self.is_flat(name) else "", form=self.form(name))

    def cut_origins(self, layer: int, cut: LayerCut) -> Iterator[tuple[str, Origin]]:
        """Yield the names and origins of the tensors of a layer whose experts are those of ``cut``."""
        for name in self.names[layer]:
            role, match = self.role(name), _EXPERT.fullmatch(name)
            if role == "expert" and match:
                if match[2] == "0":
                    yield from self._cut_matrix(match[1], match[3], cut)
            elif role == "other":
                yield name, Origin(name)
            elif role in ("experts", "expert biases") and cut.merges:
                part: Any = matrix_of(name)
                scale = cut.scale if part in ("down", "down_bias") else 1.0
                form = self.form(name)
                yield name, ExpertTerms(name, experts=cut.experts, names=(name,), part=part, scale=scale, form=form)
            else:
                flat: Any = "row" if self.is_flat(name) else ""
                yield name, ExpertRows(name, taken=cut.rows, flat=flat, form=self.form(name))

    def _cut_matrix(self, prefix: str, matrix: str, cut: LayerCut) -> Iterator[tuple[str, Origin]]:
        names = tuple(f"{prefix}.{expert}.{matrix}.weight" for expert in range(self.experts))
        for place, terms in enumerate(cut.experts):
            first = names[terms[0].expert]
            plain = terms == (Term(terms[0].expert),)
            part: Any = _MATRICES.get(matrix, matrix)
            scale = cut.scale if part == "down" else 1.0
            whole = (
                Origin(first) if plain else ExpertTerms(first, experts=(terms,), names=names, part=part, scale=scale)
            )
            yield f"{prefix}.{place}.{matrix}.weight", whole

    @cached_property
    def expert_width(self) -> int:
        """The number of neurons of one routed expert."""
        downs = ((name, spec) for name, spec in self.specs.items() if is_down(name))
        return next(self.form(name).plain_shape(tuple(spec.shape))[-1] for name, spec in downs)

    def form(self, name: str) -> FusedForm:
        """Return how a tensor of all experts' matrices is stored; of any other tensor, that it is as it is.

        transformers takes the experts of some classes in two layouts, and tells them apart by their shapes.
        """
        if self.family.clamped:
            return clamped_form(matrix_of(name))
        if not self.family.transposes or not _EXPERTS.fullmatch(name):
            return PLAIN
        return FusedForm(transposed=tuple(self.specs[name].shape) != self._fused_shape(name), square=True)

    def _fused_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor of all experts has in the stock class."""
        width = getattr(self.stock, "moe_intermediate_size", 0)
        rows = (self.hidden_size, width) if is_down(name) else (2 * width, self.hidden_size)
        return (self.experts, *rows)

    def config_with(self, experts: int, top_k: int, width: int | None = None) -> dict[str, Any]:
        """Return ``config.json`` with the numbers under every key that spells them; ``width`` is the neurons of an expert."""
        if self.family.sparse_mixer and top_k != SPARSE_MIXED:
            raise RefusalError(
                f"top_k {top_k}: a '{self.family.name}' router always chooses {SPARSE_MIXED} experts, whatever config.json says",
                hint="leave the number of experts per token as it is",
            )
        config = self.family.text(self.raw)
        spelt = {"num_experts", "num_local_experts"} & set(config) or {self.family.experts_key}
        changed = {**dict.fromkeys(spelt, experts), self.family.top_k_key: top_k}
        if width is not None and width != self.expert_width:
            # A key that the class does not read may be there, too, with another number.
            known = type(self.stock)()
            keys = [key for key in ("moe_intermediate_size", "intermediate_size") if hasattr(known, key)]
            changed[next(key for key in keys if getattr(self.stock, key) == self.expert_width)] = width
        return self.family.with_text(self.raw, changed)

    def expert_origins(self, layer: int) -> Iterator[tuple[int, Origin]]:
        """Yield every tensor, or part of one, that holds matrices of a single expert, after that expert's index."""
        for name in self.names[layer]:
            role, match = self.role(name), _EXPERT.fullmatch(name)
            if role == "expert" and match:
                yield int(match[2]), Origin(name)
            elif role in ("experts", "expert biases"):
                yield from ((expert, ExpertRows(name, taken=(expert,))) for expert in range(self.experts))

    def stock_parts(self, layer: int | None) -> dict[str, list[str]]:
        """Return, for each tensor of the stock module, the stored tensors that it is made of, one after another."""
        parts: dict[str, list[str]] = {}
        single: dict[str, dict[tuple[int, str], str]] = {}
        for name in self.names[layer]:
            if match := _EXPERT.fullmatch(name) if self.role(name) == "expert" else None:
                prefix, index, matrix = match.groups()
                single.setdefault(self.stock_name(prefix + "."), {})[int(index), _MATRICES.get(matrix, matrix)] = name
            else:
                parts[self.stock_name(name)] = [name]
        for prefix, names in single.items():
            ordered = sorted(names)  # gate before up
            parts[f"{prefix}gate_up_proj"] = [names[key] for key in ordered if key[1] != "down"]
            parts[f"{prefix}down_proj"] = [names[key] for key in ordered if key[1] == "down"]
        return parts

    def check(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Compare the tensors with those of the stock class (``shapes``, of the whole model).

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another size; the message names it.
        """
        parts = {name: stored for layer in self.names for name, stored in self.stock_parts(layer).items()}
        for name, shape in shapes.items():
            if name not in parts:
                raise CheckpointError(
                    f"{where}: tensor '{name}' is missing",
                    hint=BELONG_TOGETHER,
                )
            sizes, found = TensorSpec(shape, "float32").elements, sum(self.specs[n].elements for n in parts[name])
            first = parts[name][0]
            alone = tuple(self.specs[first].shape)
            alone = alone if self.family.clamped else self.form(first).plain_shape(alone)
            if sizes != found or (len(parts[name]) == 1 and alone != shape):
                raise CheckpointError(
                    f"{where}: tensor '{parts[name][0]}' has shape {list(self.specs[parts[name][0]].shape)}"
                    + (f", and there are {len(parts[name])} such" if len(parts[name]) > 1 else "")
                    + f"; config.json asks for {list(shape)} in '{name}'",
                    hint=BELONG_TOGETHER,
                )
        if leftover := sorted(set(parts) - set(shapes)):
            raise CheckpointError(
                f"{where}: tensor '{parts[leftover[0]][0]}' is not part of a {self.family.name} model and would be lost",
                hint="layers for multi-token prediction are left out by stock classes: remove them first",
            )

    def stock_name(self, name: str) -> str:
        """Return the name that the stock module gives to what is stored under ``name``, alone or with others."""
        for stored, stock in self.family.renames:
            name = name.replace(stored, stock)
        return name


def _paths(family: MoeFamily, whole: Any) -> ModulePaths:
    return module_paths_of(whole) if family.parts else find_module_paths(family.name)


def matrix_of(name: str) -> str:
    """Return which matrix a stored tensor of experts holds: gate, up, gate_up (of fused ones) or down; empty: none.

    Biases of fused ones are gate_up_bias and down_bias.
    """
    if match := _EXPERT.fullmatch(name):
        return _MATRICES.get(match[3], match[3])
    if match := _BIASES.fullmatch(name):
        return f"{match[1]}_bias"
    if not _EXPERTS.fullmatch(name):
        return ""
    return "down" if "down_proj" in name or "output_linear" in name else "gate_up"


def is_down(name: str) -> bool:
    """Return whether a stored tensor of experts, of one or of all, holds down projections."""
    return matrix_of(name) == "down"


def expert_index(name: str) -> int | None:
    """Return which expert a stored tensor belongs to; None: to all or none."""
    match = _EXPERT.fullmatch(name)
    return int(match[2]) if match else None


def _natural(name: str) -> list[Any]:
    """Return a sort key that compares the numbers in names as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
