"""A validated conversion: the parts a recipe names, the shapes, and every tensor of the output with its file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.moe.base import Target, refuse_unheld
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit, shards_of
from upcycle.errors import RefusalError, UsageError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.files.formats.tensor_files import widest
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.base import PREFERRED_MULTIPLE, AnyMethod, Method
from upcycle.recipe.conversion_recipe import Recipe, layer_selection, parse_parameters, parse_size
from upcycle.registry import TARGETS, load, suggestion
from upcycle.routers.base import Router

if TYPE_CHECKING:
    from upcycle.checkpoints.mixed_checkpoint import Mix

CALIBRATION_HINT = "--calibration demo, a text file, or a hub dataset"


@dataclass(frozen=True)
class Job:
    """A validated conversion: the parts chosen by the recipe, the shapes, and the files to write."""

    recipe: Recipe
    dense: DenseConfig
    family: Family
    target: Target
    method: Method
    router: Router
    router_name: str
    shape: MoeShape
    scale: float
    refit: Literal["down", "scale", "none"]
    shards: tuple[Shard, ...]
    dense_specs: Mapping[str, TensorSpec]
    note: str | None = None  # what the source says of how it is read

    @property
    def units(self) -> Iterator[Unit]:
        """All units in the order they are written."""
        return (unit for shard in self.shards for unit in shard.units)

    @property
    def calibrated(self) -> bool:
        """Whether layers are decided on calibration text."""
        return bool(self.recipe.calibration.texts) and _looks_at_text(self.method, self.router)

    @property
    def sampled(self) -> bool:
        """Whether layers are decided on what the recipe's sources name: prompts or texts."""
        return self.router.samples is not None

    @property
    def calibration_mode(self) -> Literal["parallel", "sequential"]:
        """Where a layer's inputs come from. Converted layers that equal the dense ones feed the next what those would."""
        wanted = self.recipe.calibration.mode
        if self.method.kind == "copies":
            return "parallel"
        if wanted != "auto":
            return wanted
        return "sequential" if self.promise[0] == "approximate" else "parallel"

    @property
    def dtype(self) -> str:
        """The dtype of the experts, which is the one ``config.json`` names."""
        layers = self.shape.moe_layers if self.recipe.dtype == "keep" else self.shape.moe_layers[:1]
        return widest(self.family.ffn_dtype(self.dense, self.dense_specs, i, self.recipe.dtype) for i in layers)

    @property
    def promise(self) -> tuple[str, str]:
        """``exact``, ``rounded`` or ``approximate``, and why.

        ``rounded``: exact but for a factor that the stored dtype cannot apply without rounding.
        """
        experts, top_k = self.shape.experts, self.shape.top_k
        if reason := self.method.inexact(self.shape, self.scale):
            return "approximate", reason
        exact_scale = self.method.scale("exact", experts, top_k)
        if self.scale != exact_scale and (top_k == experts or self.method.exact_with_any_router):
            return "approximate", f"the routed experts are scaled by {self.scale:g}, equality needs {exact_scale:g}"
        if not self.method.exact_with_any_router:
            if top_k < experts:
                return "approximate", f"{top_k} of {experts} experts run per token"
            if not self.router.equal_weights:
                return "approximate", f"the {self.router_name} router does not weigh all experts equally"
        if not self.rounding_factors:
            return "exact", "the same function as the dense model"
        return (
            "rounded",
            f"the factor {self.rounding_factors[0]:g} rounds in {self.dtype}; --dtype float32 or a power of two is exact",
        )

    @property
    def family_name(self) -> str:
        """The dense architecture."""
        return self.family.name

    @property
    def context(self) -> int:
        """The longest input in tokens."""
        return self.dense.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Of the dense model and the result."""
        return self.dense.vocab_size

    @property
    def config(self) -> dict[str, Any]:
        """The result's ``config.json``."""
        return self.target.full_config(self.dense, self.shape, self.dtype)

    @property
    def recipe_text(self) -> str:
        """The resolved recipe."""
        return self.recipe.dump()

    @property
    def record(self) -> dict[str, Any]:
        """What only this kind of conversion has to say in ``upcycle.json``."""
        return {
            "router": {"name": self.router_name, "title": self.router.title, "paper": self.router.paper},
            "target": self.target.name,
            "scale": self.scale,
            "refit": self.refit,
            "moe_layers": list(self.shape.moe_layers),
        }

    @property
    def factors(self) -> tuple[float, ...]:
        """What the routed experts' gate, up and down are multiplied by."""
        return tuple(self.scale**power for power in self.method.spread)

    @property
    def rounding_factors(self) -> list[float]:
        """Those of all factors on experts that the stored dtype cannot apply without rounding."""
        own = map(self.method.told_scale, self.method.members + self.method.shared_members)
        return (
            [] if self.dtype in ("float32", "float64") else [f for f in (*self.factors, *own) if not is_power_of_two(f)]
        )


def method_of(recipe: Recipe) -> AnyMethod:
    """The method that a recipe names, with its parameters.

    Raises:
        UsageError: there is no such method, or a parameter is wrong.
    """
    cls = load("method", recipe.method)
    method: AnyMethod = cls(parse_parameters(cls.Parameters, recipe.parameters, "parameters"))
    return method


def prepare(
    recipe: Recipe,
    family: Family,
    dense: DenseConfig,
    specs: Mapping[str, TensorSpec],
    has_tokenizer: bool = True,
    mix: Mix | None = None,
) -> Job:
    """Choose the parts a recipe names and work out every output tensor.

    Raises:
        UsageError: the recipe cannot be carried out on this model.
        RefusalError: no target, or not the wanted one, can hold the result.
    """
    check_tokenizer(recipe, has_tokenizer)
    method = method_of(recipe)
    assert isinstance(method, Method)
    method.check_roles(recipe.sources)
    method.join(mix and replace(mix, told=tuple(method.told(recipe.sources))))
    recipe = _with_implied(_with_shared_held(_with_sizes(recipe, dense), family), method)
    layers = layer_selection(recipe.layers, dense.num_hidden_layers)
    size = method.expert_size(dense.intermediate_size, recipe.experts, recipe.shared, recipe.pad)
    shape = MoeShape(recipe.experts, recipe.top_k, recipe.shared, size, layers, method.normalized, dense.ffn_form)
    method.check(shape)
    target = _choose_target(recipe, family, dense, shape)
    router_name = recipe.router.name
    sparse = recipe.top_k < recipe.experts or not method.exact_when_all_active
    texts = recipe.calibration.texts
    if router_name == "auto":
        split_name = ("ridge" if texts else "cool") if sparse else "zero"
        router_name = "random" if method.kind == "copies" else split_name
    router_class = load("router", router_name)
    router: Router = router_class(
        parse_parameters(router_class.Parameters, recipe.router.parameters, "router.parameters")
    )
    router.check(recipe.experts, recipe.top_k)
    members, told = method.members, recipe.model_copy(update={"sources": method.told(recipe.sources)})
    router.check_sources(told, members, copies=bool(members) and recipe.experts != method.sizes(None, None)[0])
    refit = _refit(recipe, method, sparse)
    if method.undecided(recipe) and not texts:
        raise UsageError(
            f"method {method.name} keeps a merge that does not predict your text worse, and there is none",
            hint=CALIBRATION_HINT,
        )
    for wants, what in ((method.calibrated, f"method {method.name}"), (router.calibrated, f"router {router_name}")):
        if wants and not texts:
            raise UsageError(f"{what} looks at activations and needs calibration text", hint=CALIBRATION_HINT)
    scale = recipe.scale
    if scale == "auto":
        scale = "sum" if method.kind != "copies" and (router.calibrated or refit != "none") else method.default_scale
    factor = scale if isinstance(scale, float) else method.scale(scale, recipe.experts, recipe.top_k, recipe.shared)
    if refit == "down" and factor != recipe.top_k:
        raise UsageError(
            f"a refit fits the plain sum of the chosen experts: scale {recipe.top_k}, not {factor:g} (--scale {recipe.scale})",
            hint="leave --scale out, or use --refit none",
        )
    if family.uncalibrated and (router.walks or (texts and _looks_at_text(method, router))):
        raise RefusalError(
            f"a {family.name} model cannot be calibrated: {family.uncalibrated}",
            hint="leave the calibration text out, and choose a method and a router that need none",
        )
    units = _units(recipe, family, dense, target, shape, specs)
    shards = shards_of(units, parse_size(recipe.max_shard_size))
    return Job(recipe, dense, family, target, method, router, router_name, shape, factor, refit, shards, specs)


def check_tokenizer(recipe: Recipe, has_tokenizer: bool) -> None:
    """Refuse to copy a tokenizer that is not there.

    Raises:
        UsageError: there is none beside the weights.
    """
    if recipe.tokenizer == "copy" and not has_tokenizer:
        is_gguf, files = recipe.source.endswith(".gguf"), "tokenizer.json, tokenizer.model, vocab.json, tekken.json"
        looked = "metadata keys tokenizer.ggml.model and tokenizer.ggml.tokens" if is_gguf else files
        raise UsageError(
            f"{recipe.source} has no tokenizer (looked for {looked})",
            hint="put the tokenizer's files beside the weights, or go without: --tokenizer none",
        )


def _looks_at_text(method: Method, router: Router) -> bool:
    """Whether a calibration text is read where there is one: every split is refitted on it, copies need a reason."""
    return method.kind != "copies" or method.calibrated or router.calibrated


def _with_implied(recipe: Recipe, method: Method) -> Recipe:
    """The recipe with the numbers that follow from the method's parameters.

    Raises:
        UsageError: the recipe names other ones, or fewer experts than are to run.
    """
    named = [getattr(recipe, key) if key in recipe.model_fields_set else None for key in ("experts", "top_k")]
    experts, top_k = method.sizes(*named)
    experts = recipe.experts if experts is None else experts
    top_k = recipe.top_k if top_k is None else top_k
    shared = method.shared_experts
    if shared is None or recipe.shared:  # another number than the sources' is refused with the widths
        shared = recipe.shared
    if top_k > experts:
        raise UsageError(f"top_k is {top_k}, but there are only {experts} experts", hint="a smaller --top-k")
    return recipe.model_copy(update={"experts": experts, "top_k": top_k, "shared": shared})


_ALWAYS_ON = 0.5  # of what runs, where a recipe names a fraction and no numbers


def _with_sizes(recipe: Recipe, dense: DenseConfig) -> Recipe:
    """The recipe with the numbers that its active fraction comes to; layers that stay dense run whole and count.

    Raises:
        UsageError: the fraction leaves nothing to choose among.
    """
    if recipe.active is None:
        return recipe
    if load("method", recipe.method).kind == "copies":
        raise UsageError(
            f"active says how much of a split runs, and {recipe.method} copies whole FFNs",
            hint="--experts and --top-k, or --method alternating",
        )
    total, split = dense.num_hidden_layers, len(layer_selection(recipe.layers, dense.num_hidden_layers))
    pieces = pieces_of(dense.intermediate_size, recipe.pieces)
    running = round(pieces * (recipe.active * total - (total - split)) / split)
    if not 2 <= running < pieces:
        raise UsageError(
            f"active {recipe.active:g} would run {max(0, running)} of {pieces} experts in each of {split} layers",
            hint="a larger active or pieces, or more layers",
        )
    shared = max(1, round(_ALWAYS_ON * running))
    pad = recipe.pad or dense.intermediate_size % (pieces * PREFERRED_MULTIPLE) > 0
    sizes = {"experts": pieces - shared, "top_k": running - shared, "shared": shared, "active": None, "pad": pad}
    return recipe.model_copy(update=sizes)


def pieces_of(intermediate_size: int, most: int) -> int:
    """The most equal experts, up to ``most``, whose width is a multiple of 8; ``most`` itself (padded) if there are none."""
    fitting = [n for n in range(4, most + 1) if intermediate_size % (n * PREFERRED_MULTIPLE) == 0]
    return max(fitting, default=most)


def _with_shared_held(recipe: Recipe, family: Family) -> Recipe:
    """The recipe, or where no target of the family holds shared experts and it allows that, one that routes them all."""
    names = family.targets if recipe.target == "auto" else (recipe.target,)
    if recipe.shared_unheld == "refuse" or not recipe.shared or any(name not in TARGETS for name in names):
        return recipe
    if load("method", recipe.method).kind == "copies":  # their routed experts are not like the shared ones
        return recipe
    if any(Feature.SHARED_EXPERTS in load("target", name).holds for name in names):
        return recipe
    sizes = {"experts": recipe.experts + recipe.shared, "top_k": recipe.top_k + recipe.shared, "shared": 0}
    return recipe.model_copy(update=sizes)


def _refit(recipe: Recipe, method: Method, sparse: bool) -> Literal["down", "scale", "none"]:
    """What is fitted. Copies, and splits with all experts on, are exact already: a refit leaves them alone."""
    texts = recipe.calibration.texts
    if recipe.refit in ("down", "scale") and not texts:
        raise UsageError(f"--refit {recipe.refit} needs calibration text", hint=CALIBRATION_HINT)
    if method.kind == "copies" or not sparse or not texts:
        return "none"
    return "down" if recipe.refit == "auto" else recipe.refit


def _choose_target(recipe: Recipe, family: Family, dense: DenseConfig, shape: MoeShape) -> Target:
    needed = {Feature.SHARED_EXPERTS} if shape.shared else set()
    stays_dense = dense.num_hidden_layers - len(shape.moe_layers)
    if stays_dense:
        needed.add(Feature.DENSE_FIRST if min(shape.moe_layers) == stays_dense else Feature.DENSE_LAYERS)
    candidates: list[Target] = [load("target", name)() for name in family.targets]
    weighing = [target for target in candidates if shape.normalized or target.holds_unnormalized]
    if recipe.target == "auto":
        chosen = next((target for target in weighing or candidates if not target.lacks(dense, needed)), candidates[0])
    elif recipe.target not in TARGETS:
        raise UsageError(f"unknown target '{recipe.target}'", hint=suggestion(recipe.target, ["auto", *TARGETS]))
    else:
        chosen = load("target", recipe.target)()
    refuse_unheld(chosen, family, dense, needed, weighing)
    if not (shape.normalized or chosen.holds_unnormalized):
        able = [target.name for target in weighing if not target.lacks(dense, needed)]
        raise RefusalError(
            f"{chosen.name} always makes the chosen experts' weights sum to 1, gate=softmax leaves them as they are",
            hint=f"use --target {able[0]}" if able else "use --param gate=normalized",
        )
    return chosen


def _units(
    recipe: Recipe, family: Family, dense: DenseConfig, target: Target, shape: MoeShape, specs: Mapping[str, TensorSpec]
) -> list[Unit]:
    def dtype(origin: Origin) -> str:
        return origin.dtype(specs[origin.name].dtype if recipe.dtype == "keep" else recipe.dtype)

    def copied(shapes: Mapping[str, tuple[int, ...]]) -> list[OutputEntry]:
        origins = {name: target.origin(family, dense, name) for name in shapes}
        written = {name: family.module_paths.renamed(name, target.module_paths) for name in shapes}
        return [OutputEntry(written[name], TensorSpec(shapes[name], dtype(o)), o) for name, o in origins.items()]

    units = [Unit("embeddings", None, tuple(copied(family.first_specs(dense))))]
    for layer in range(dense.num_hidden_layers):
        entries = copied(family.layer_specs(dense, layer))
        if layer in shape.moe_layers:
            expert_dtype = family.ffn_dtype(dense, specs, layer, recipe.dtype)
            entries += [
                OutputEntry(tensor.name, TensorSpec(tensor.shape, tensor.dtype or expert_dtype), built=tensor)
                for tensor in target.moe_tensors(dense, shape, layer, recipe.layout)
            ]
        else:
            entries += copied(family.ffn_specs(dense, layer))
        units.append(Unit(f"layer {layer}", layer, tuple(entries)))
    units.append(Unit("final norm", None, tuple(copied(family.last_specs(target.stored(dense))))))
    return units


def is_power_of_two(value: float) -> bool:
    """Whether multiplying by ``value`` is exact in every floating-point dtype (bar overflow)."""
    return value > 0 and math.frexp(value)[0] == 0.5
