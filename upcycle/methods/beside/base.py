"""What methods have in common that leave a dense model as it is and put experts of low rank beside its FFNs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.dense.narrowed import MadeTensor
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.growing.base import Described, Grown, Growth, Piece
from upcycle.recipe.conversion_recipe import Recipe, layer_selection

if TYPE_CHECKING:
    from upcycle.models.own.adapted_ffn import AdaptedFfn

_TARGET = "upcycle_moe"
_ROUTER_SPREAD = 0.02


@dataclass(frozen=True)
class DrawnTensor(MadeTensor):
    """The origin of a tensor of random numbers: normal ones of deviation ``spread``, or, where ``even``, from ``-spread`` to it.

    ``part`` is the tensor's name, of which the numbers are a function, with the recipe's seed.
    """

    spread: float = 1.0
    even: bool = False


@dataclass(frozen=True)
class ClusterTensor(MadeTensor):
    """The origin of what assigns instructions to clusters, which are found on text; ``part`` is ``products`` or ``norms``."""

    def dtype(self, dtype: str) -> str:
        """Return float32: distances decide."""
        return "float32"


class BesideMethod(Growth):
    """Keeps every tensor of a dense model, and puts experts of low rank and a router beside each FFN. They begin by adding nothing.

    Attributes:
        usual: experts and experts per token where the recipe names none.
    """

    kind = "beside"
    takes = "dense"
    keys = frozenset({"experts", "top_k", "layers", "dtype", "target", "calibration"})
    next_step = "upcycle train mocle --model {out} --output {out}-tuned --set data=chat.jsonl"
    usual: ClassVar[tuple[int, int]]

    @abstractmethod
    def described(self, linears: tuple[str, ...], hidden: int, vocabulary: int, experts: int, top_k: int) -> AdaptedFfn:
        """Describe the experts beside an FFN, without paths.

        Args:
            linears: the names of its linear layers.
            hidden: the length of its input and output.
            vocabulary: token ids of the model.
            experts: E.
            top_k: experts per token.

        Raises:
            UsageError: the numbers do not fit together.
        """

    @property
    def clusters(self) -> int:
        """How many clusters of instructions there are; 0: routers read tokens."""
        return 0

    @property
    def instruction(self) -> int:
        """How many of a document's first tokens its instruction is."""
        return 0

    @property
    def text_for(self) -> str | None:
        """What calibration text is needed for."""
        return "the clustering of instructions" if self.clusters else None

    def grow(self, source: Described, recipe: Recipe, choice: Any = None) -> Grown:
        """Describe the model with experts beside its FFNs; nothing is chosen."""
        from upcycle.architectures.stock_auto import class_name, is_encoder

        if recipe.target not in ("auto", _TARGET):
            raise UsageError(
                f"{self.name} puts experts beside FFNs, and only {_TARGET} holds such a model, not '{recipe.target}'",
                hint="leave --target out",
            )
        family, dense = _family_of(source, self.name)
        settings, modules = _modules(source, family, dense)
        if self.clusters and is_encoder(settings):
            raise RefusalError(
                f"{self.name} gives a text the experts of its instruction, and a '{family.name}' model is an encoder",
                hint="--param router=tokens",
            )
        if self.clusters * self.instruction > recipe.calibration.tokens:
            most = max(1, recipe.calibration.tokens // self.clusters)
            raise UsageError(
                f"{self.clusters} clusters need as many instructions of {self.instruction:,} tokens, and calibration.tokens is "
                f"{recipe.calibration.tokens:,}",
                hint=f"--param instruction={most} or less, fewer clusters, or a larger calibration.tokens",
            )
        told = recipe.model_fields_set
        experts, top_k = (
            getattr(recipe, key) if key in told else usual
            for key, usual in zip(("experts", "top_k"), self.usual, strict=True)
        )
        if top_k > experts:
            raise UsageError(
                f"top_k is {top_k}, and there are {experts} experts",
                hint=f"--top-k {experts} or fewer, or more experts",
            )
        layers = layer_selection(recipe.layers, dense.num_hidden_layers)
        alike: dict[AdaptedFfn, list[int]] = defaultdict(list)
        for layer in layers:
            _, linears = modules[layer]
            found = self.described(tuple(linears), dense.at(layer).hidden_size, dense.vocab_size, experts, top_k)
            alike[found].append(layer)
        entries = [
            replace(ffn, paths=tuple(family.replaced_modules(layer) for layer in own)).to_json()
            for ffn, own in alike.items()
        ]
        by_layer = {layer: ffn for ffn, own in alike.items() for layer in own}
        pieces, added, idle = _pieces(family, dense, by_layer, modules, self.clusters)
        config = {
            **{key: value for key, value in family.rewritten(source.raw).items() if key != "torch_dtype"},
            "architectures": [f"UpcycleMoe{class_name(settings)}"],
            "model_type": _TARGET,
            "base_model_type": family.rewritten(source.raw)["model_type"],
            "replaced_ffns": [],
            "adapted_ffns": entries,
            "dtype": recipe.dtype if recipe.dtype != "keep" else (dense.dtype or "float32"),
        }
        first = by_layer[layers[0]]
        return Grown(
            config=config,
            pieces=pieces,
            promise=("exact", "experts begin by adding nothing"),
            summary=f"{experts} experts of rank {first.rank}{' and a universal one' if first.universal else ''} beside "
            f"{len(layers)} FFNs, top-{top_k}: {added:,} parameters more",
            made={},
            context=dense.max_position_embeddings,
            vocab_size=dense.vocab_size,
            hidden_size=dense.hidden_size,
            tied=dense.tie_word_embeddings,
            idle=idle,
            resolved={"experts": experts, "top_k": top_k},
            warnings=(f"{_TARGET} is upcycle's own architecture: transformers loads it after `import upcycle.models`",),
        )

    def memory(self, source: Described, recipe: Recipe) -> int:
        """Return the bytes that clustering takes: the embeddings in fp32, and a mean of them per instruction."""
        if not self.clusters:
            return 0
        largest = max(spec.elements for spec in source.specs.values())
        rows = recipe.calibration.tokens // max(1, self.instruction)
        return 4 * (largest + rows * int(source.raw.get("hidden_size", 0)))


def _family_of(source: Described, method: str) -> tuple[Family, DenseConfig]:
    """Return the architecture of a model, each of whose FFNs is one module.

    Raises:
        RefusalError: it is another.
    """
    from upcycle.checkpoints.find_family import family_of

    family = family_of(source.raw, source.where)
    dense = family.config(source.raw)
    why = ""
    if family.tower_specs(dense) or family.parts:
        why = "it has other parts beside its text model"
    elif family.reads != "text":
        why = "it reads no text alone"
    elif any(len(family.replaced_modules(layer)) > 1 for layer in range(dense.num_hidden_layers)):
        why = "its FFN is two modules that a layer calls one after another"
    if why:
        raise RefusalError(
            f"{method} does not take a '{family.name}' model: {why}",
            hint="it takes decoders and encoders of text whose FFN is one module, such as Llama's or GPT-2's",
        )
    return family, dense


def _modules(source: Described, family: Family, dense: DenseConfig) -> tuple[Any, dict[int, tuple[Any, list[str]]]]:
    """Return a model's configuration, and by layer its FFN on the meta device with the names of its linear layers."""
    from upcycle.architectures.stock import build_config, empty_model
    from upcycle.models.own.lora_block import linears_inside

    settings = build_config(source.raw, source.where)
    base = empty_model(settings, source.where).base_model
    found = {}
    for layer in range(dense.num_hidden_layers):
        (path,) = family.replaced_modules(layer)
        ffn = base.get_submodule(path)
        found[layer] = ffn, linears_inside(ffn)
    return settings, found


def _pieces(
    family: Family,
    dense: DenseConfig,
    by_layer: Mapping[int, AdaptedFfn],
    modules: Mapping[int, tuple[Any, list[str]]],
    clusters: int,
) -> tuple[tuple[Piece, ...], int, int]:
    """Return all tensors of the result, the parameters that are new, and those of experts that a token does not use."""
    first, outside = family.first_specs(dense), family.stored_specs(dense, None)
    like = next(iter(first))
    pieces = [Piece("embeddings", None, _written(family, dense, first))]
    added = idle = 0
    for layer in range(dense.num_hidden_layers):
        tensors = _written(family, dense, family.stored_specs(dense, layer))
        if layer in by_layer:
            ffn, (module, _) = by_layer[layer], modules[layer]
            block = f"{family.module_paths.block_of(layer)}."
            inside = f"{block}dense."
            tensors = {n.replace(block, inside, 1) if n.startswith(block) else n: o for n, o in tensors.items()}
            own = next(origin.name for name, origin in tensors.items() if name.startswith(inside))
            new = _new_tensors(ffn, module, block, own)
            tensors |= new
            pairs = sum(math.prod(_shape(origin)) for name, origin in new.items() if ".experts." in name)
            added += sum(math.prod(_shape(origin)) for origin in new.values())
            idle += pairs * max(0, ffn.experts - ffn.rule.most_experts(ffn.experts)) // ffn.copies
        pieces.append(Piece(f"layer {layer}", layer, tensors))
    if clusters:
        ffn = next(iter(by_layer.values()))
        prefix = (
            f"{family.module_paths.body}.instruction_clusters" if family.module_paths.body else "instruction_clusters"
        )
        shapes = {"products": (ffn.vocabulary, ffn.clusters), "norms": (ffn.clusters,)}
        found = {f"{prefix}.{part}": ClusterTensor(like, shape=shape, part=part) for part, shape in shapes.items()}
        added += sum(math.prod(shape) for shape in shapes.values())
        pieces.append(Piece("clusters", None, found))
    rest = {name: shape for name, shape in outside.items() if name not in first}
    pieces.append(Piece("final norm", None, _written(family, dense, rest)))
    return tuple(pieces), added, idle


def _new_tensors(ffn: AdaptedFfn, module: Any, block: str, like: str) -> dict[str, Origin]:
    """Return the tensors of a router and of experts, by name; ``like`` is a stored tensor whose dtype they have."""
    from upcycle.models.own.lora_block import BEHIND_FFN, linear_sizes

    router, reads = f"{block}router", ffn.embedding if ffn.clusters else ffn.hidden_size

    def drawn(name: str, *shape: int, spread: float, even: bool = False) -> dict[str, Origin]:
        return {name: DrawnTensor(like, shape=shape, part=name, spread=spread, even=even)}

    found = drawn(f"{router}.weight", ffn.experts, reads, spread=_ROUTER_SPREAD)
    if ffn.clusters:
        found |= drawn(f"{router}.clusters", ffn.clusters, ffn.embedding, spread=1.0)
    sizes = {path.replace(".", "_"): linear_sizes(module.get_submodule(path)) for path in ffn.linears}
    for name, (wide, out) in (sizes or {BEHIND_FFN: (ffn.hidden_size, ffn.hidden_size)}).items():
        rows, pair = ffn.copies * ffn.rank, f"{block}experts.pairs.{name}"
        found |= drawn(f"{pair}.a", rows, wide, spread=1 / math.sqrt(wide), even=True)
        found[f"{pair}.b"] = Origin(like, filled=((rows, out), 0.0))
    return found


def _shape(origin: Origin) -> tuple[int, ...]:
    if isinstance(origin, MadeTensor):
        return origin.shape
    assert origin.filled is not None
    return origin.filled[0]


def _written(family: Family, dense: DenseConfig, stored: Mapping[str, Any]) -> dict[str, Origin]:
    return {family.written(dense, name): Origin(name) for name in stored}
