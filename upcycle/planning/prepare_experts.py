"""Turns a recipe and a dense model into the job that makes experts of it: its parts, shapes and output tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.moe.base import Target, refuse_unheld
from upcycle.architectures.stock_auto import SEEDED
from upcycle.architectures.tensor_origin import Origin
from upcycle.architectures.towers.composite_target import check_part, target_of
from upcycle.architectures.towers.parts import PartsFamily
from upcycle.checkpoints.output_layout import OutputEntry, Unit, shards_of
from upcycle.errors import RefusalError, UsageError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.base import AnyMethod, Method
from upcycle.methods.mixing.base import mixing
from upcycle.planning.expert_job import ExpertJob, looks_at_text
from upcycle.planning.job import CALIBRATION_HINT, check_calibrates, check_columns, check_text, check_tokenizer
from upcycle.planning.kept_units import kept_units
from upcycle.planning.own_text import check_own_text
from upcycle.planning.projections import imitated_projections, with_imitated
from upcycle.planning.routing_rule import (
    check_causal,
    check_counts,
    check_refit,
    check_rule,
    refuse_unroutable,
    router_form,
    rule_of,
    scale_by,
    with_all_experts,
)
from upcycle.planning.split_sizes import with_sizes
from upcycle.recipe.conversion_recipe import Recipe, RefitKind, layer_selection, parse_size
from upcycle.recipe.validated import validated
from upcycle.registry import OWN_TARGETS, TARGETS, load, suggestion
from upcycle.routers.base import Router

if TYPE_CHECKING:
    from upcycle.checkpoints.mixed_checkpoint import Mix

J = TypeVar("J", bound=ExpertJob)


def prepare_experts(
    kind: type[J],
    recipe: Recipe,
    method: AnyMethod,
    family: Family,
    dense: DenseConfig,
    specs: Mapping[str, TensorSpec],
    has_tokenizer: bool = True,
    mix: Mix | None = None,
    note: str | None = None,
) -> J:
    """Choose the parts that a recipe names and work out every output tensor. No argument is changed.

    Args:
        kind: the class of the job to return.
        recipe: the user's recipe.
        method: the recipe's method, without the sources.
        family: the architecture of the dense model.
        dense: its configuration.
        specs: shape and dtype of each of its tensors.
        has_tokenizer: whether a tokenizer lies beside them.
        mix: the sources, where there are several.
        note: a remark of the source on how it is read, for the plan's warnings.

    Raises:
        UsageError: the recipe cannot be carried out on this model.
        RefusalError: no target can hold the result, or the one that the recipe names cannot.
    """
    check_part(family, recipe.parts)
    if recipe.sources:
        family.check_known_whole(method.name)
    if family.reads in SEEDED and not has_tokenizer:
        recipe = recipe.model_copy(update={"tokenizer": "none"})
    check_tokenizer(recipe, has_tokenizer)
    check_own_text(recipe, family.encoder, family.calibrates_on or family.reads)
    check_columns(recipe, family)
    check_counts(recipe)
    method = method.joined(mix, recipe)
    assert isinstance(method, Method)
    targets = _targets(recipe, family)
    inside = family.layers_of(recipe.parts, dense.num_hidden_layers)
    recipe = _with_shared_held(with_sizes(recipe, method, dense, inside), method, targets)
    recipe = with_all_experts(_with_implied(recipe, method))
    shape = _shape(recipe, method, dense, _chosen(recipe, family, dense.num_hidden_layers))
    check_causal(recipe, dense, shape)
    target = _choose_target(recipe, family, targets, dense, shape)
    refuse_unroutable(target, shape)
    sparse = not shape.runs_all or not method.exact_when_all_active
    texts = recipe.calibration.texts
    router = _router(recipe, method, target, shape, sparse)
    router_name = router.name
    router.check(recipe.experts, recipe.top_k)
    shape = replace(shape, router=router_form(router, shape))
    _check_ties(target, method, router, recipe.experts)
    mixes = mixing(method)
    members = mixes.members if mixes else []
    check_rule(target, shape, router, len(members))
    with_merges = recipe.model_copy(update={"sources": mixes.source_recipes(recipe.sources)}) if mixes else recipe
    router.check_sources(with_merges, members, copies=bool(members) and recipe.experts != method.sizes(None, None)[0])
    refit = _refit(recipe, method, sparse, shape)
    if mixes and mixes.undecided(recipe) and not texts:
        raise UsageError(
            f"method {method.name} keeps a merge that does not predict your text worse, and there is none",
            hint=CALIBRATION_HINT,
        )
    for wants, what in ((method.calibrated, f"method {method.name}"), (router.calibrated, f"router {router_name}")):
        if wants:
            check_text(recipe, what)
    scale = recipe.scale
    if scale == "auto":
        scale = "sum" if method.kind != "copies" and (router.calibrated or refit != "none") else method.default_scale
    factor = scale if isinstance(scale, float) else scale_by(method, scale, shape)
    check_refit(recipe, refit, factor, shape)
    if router.walks or (texts and looks_at_text(method, router)):
        check_calibrates(family, method.name if method.needs_gradients else None)
    imitated = imitated_projections(recipe, family, dense, target, method, router, shape, specs)
    plan_units = kept_units if target.keeps_names else _units
    units = with_imitated(plan_units(recipe, family, dense, target, shape, specs), imitated)
    shards = shards_of(units, parse_size(recipe.max_shard_size))
    held = tuple(targets[name] for name in family.targets)
    return kind(
        *(recipe, dense, family, target, method, router, router_name, shape, factor, refit, shards, specs, held, note),
        projections=imitated,
    )


def _chosen(recipe: Recipe, family: Family, count: int) -> list[int]:
    """Return the layers that become MoE layers: those of the parts that ``layers`` says, and a part's only FFN in any case.

    Raises:
        UsageError: a part has no such layer, or layers of several parts of a model are given by their numbers.
    """
    several = isinstance(family, PartsFamily)
    parts = family.parts if several and "all" in recipe.parts else recipe.parts
    groups = [family.layers_of((part,), count) for part in parts] if several else [family.layers_of(parts, count)]
    if len(groups) > 1 and isinstance(recipe.layers, list):
        raise UsageError(
            f"layers: {recipe.layers} does not say of which of {len(groups)} parts", hint="layers: all, even or odd"
        )
    chosen = [
        group[i] for group in groups for i in ((0,) if len(group) == 1 else layer_selection(recipe.layers, len(group)))
    ]
    return sorted(chosen)


def _shape(recipe: Recipe, method: Method, dense: DenseConfig, layers: Sequence[int]) -> MoeShape:
    """Return the numbers of the result; where FFNs are of several sizes, experts are, too, and there are as many everywhere.

    Raises:
        UsageError: the method cannot divide an FFN like that.
    """
    counts, sizes = (recipe.experts, recipe.top_k, recipe.shared), dict[int, int]()
    for layer in layers:
        width = dense.at(layer).intermediate_size
        if width not in sizes:
            sizes[width] = method.expert_size(width, recipe.experts, recipe.shared, recipe.pad)
    rule = rule_of(recipe, method)
    shapes = [
        MoeShape(
            *counts, sizes.get(own.intermediate_size, 0), tuple(layers), method.normalized, own.ffn_form, rule=rule
        )
        for own in map(dense.at, range(dense.num_hidden_layers if dense.ffns else 1))
    ]
    for shape in dict.fromkeys(shapes):
        if shape.expert_size:
            method.check(shape)
    first = shapes[layers[0] if dense.ffns else 0]
    return replace(first, sizes=tuple((one.expert_size, one.form) for one in shapes)) if dense.ffns else first


def _router(recipe: Recipe, method: Method, target: Target, shape: MoeShape, sparse: bool) -> Router:
    """Return the router that a recipe names, or the one that ``auto`` stands for."""
    name = recipe.router.name
    if name == "auto":
        texts = bool(recipe.calibration.texts)
        name = "random" if target.weight_of_chosen else "zero"  # there, equal logits are what makes weights differ
        if getattr(shape.rule, "compares_norms", False):
            name = "d2d_norms" if sparse and texts else name
        elif method.kind == "copies":
            name = "random"
        elif sparse:
            name = "ridge" if texts else "cool"
    router_class = load("router", name)
    router: Router = router_class(validated(router_class.Parameters, recipe.router.parameters, "router.parameters"))
    return router


def _with_implied(recipe: Recipe, method: Method) -> Recipe:
    """Return the recipe with the numbers of experts that follow from the method's parameters filled in.

    Raises:
        UsageError: the recipe gives other numbers, or a top-k above its number of experts.
    """
    named = [getattr(recipe, key) if key in recipe.model_fields_set else None for key in ("experts", "top_k")]
    experts, top_k = method.sizes(*named)
    experts = recipe.experts if experts is None else experts
    top_k = recipe.top_k if top_k is None else top_k
    mixes = mixing(method)
    shared = mixes.shared_experts if mixes else None
    if shared is None or recipe.shared:  # a number that differs from the sources' is refused later, with the widths
        shared = recipe.shared
    if top_k > experts:
        raise UsageError(f"top_k is {top_k}, but there are only {experts} experts", hint="a smaller --top-k")
    return recipe.model_copy(update={"experts": experts, "top_k": top_k, "shared": shared})


def _check_ties(target: Target, method: Method, router: Router, experts: int) -> None:
    """Refuse equal logits where they change the weights of the chosen experts.

    Raises:
        UsageError: the router, or the method, makes rows that are equal.
    """
    if not target.weight_of_chosen:
        return
    import torch

    rows = torch.eye(experts)
    what = (
        f"the {router.name} router makes" if router.equal_weights else f"method {method.name} gives experts of a group"
    )
    if router.equal_weights or len(method.tie(rows).unique(dim=0)) < experts:
        raise UsageError(
            f"{what} equal rows, and {target.name} halves the weight of an expert whose logit another one has, too",
            hint="--router random" if router.equal_weights else "another method, such as sparse_upcycling",
        )


def _targets(recipe: Recipe, family: Family) -> dict[str, Target]:
    """Return the targets that a recipe may mean, by name.

    These are the targets of the family, in the order in which they are tried, and the target that the recipe names, if it
    exists.
    """
    named = (recipe.target,) if recipe.target in (*TARGETS, *OWN_TARGETS) else ()
    return {name: target_of(family, name) for name in (*family.targets, *named)}


def _with_shared_held(recipe: Recipe, method: Method, targets: Mapping[str, Target]) -> Recipe:
    """Return the recipe; where no target holds its shared experts, and it leaves that open, with all experts routed."""
    if recipe.shared_unheld == "refuse" or not recipe.shared or recipe.target not in ("auto", *targets):
        return recipe
    if method.kind == "copies":  # routed and shared experts are of different kinds: none can take the other's place
        return recipe
    meant = targets.values() if recipe.target == "auto" else [targets[recipe.target]]
    if any(Feature.SHARED_EXPERTS in target.holds for target in meant):
        return recipe
    sizes = {"experts": recipe.experts + recipe.shared, "top_k": recipe.top_k + recipe.shared, "shared": 0}
    return recipe.model_copy(update=sizes)


def _refit(recipe: Recipe, method: Method, sparse: bool, shape: MoeShape) -> RefitKind:
    """Return what is refitted. Copies, and splits with all experts active, are exact already and are left as they are."""
    texts = recipe.calibration.texts
    if recipe.refit not in ("auto", "none") and not texts:
        raise UsageError(f"--refit {recipe.refit} needs calibration text", hint=CALIBRATION_HINT)
    if method.kind == "copies" or not sparse or not texts:
        return "none"
    by_token = getattr(shape.rule, "per_token", True)  # what is fitted are tokens, one by one
    return ("down" if by_token else "none") if recipe.refit == "auto" else recipe.refit


def _choose_target(
    recipe: Recipe, family: Family, targets: Mapping[str, Target], dense: DenseConfig, shape: MoeShape
) -> Target:
    needed = {Feature.SHARED_EXPERTS} if shape.shared else set()
    stays_dense = dense.num_hidden_layers - len(shape.moe_layers)
    if stays_dense:
        needed.add(Feature.DENSE_FIRST if min(shape.moe_layers) == stays_dense else Feature.DENSE_LAYERS)
    candidates = [targets[name] for name in family.targets]
    weighing = [target for target in candidates if shape.normalized or target.holds_unnormalized]
    running = [target for target in weighing if target.top_k in (None, shape.top_k)]
    weighing = running or weighing
    if recipe.target == "auto":
        able = [target for target in weighing or candidates if not target.lacks(dense, needed)]
        # More engines run a rotary embedding as it was.
        as_it_is = (target for target in able if not target.masks(dense))
        chosen = next(as_it_is, able[0] if able else candidates[0])
    elif recipe.target not in targets:
        raise UsageError(
            f"unknown target '{recipe.target}'", hint=suggestion(recipe.target, ["auto", *TARGETS, *OWN_TARGETS])
        )
    else:
        chosen = targets[recipe.target]
    refuse_unheld(chosen, family, dense, needed, weighing)
    if not (shape.normalized or chosen.holds_unnormalized):
        names = [target.name for target in weighing if not target.lacks(dense, needed)]
        raise RefusalError(
            f"{chosen.name} always makes the chosen experts' weights sum to 1, gate=softmax leaves them as they are",
            hint=f"use --target {names[0]}" if names else "use --param gate=normalized",
        )
    if chosen.top_k not in (None, shape.top_k):
        names = [target.name for target in running if not target.lacks(dense, needed)]
        raise RefusalError(
            f"{chosen.name} always runs {chosen.top_k} experts per token, and 'top_k' is {shape.top_k}",
            hint=f"--top-k {chosen.top_k} with --experts, not --active, or --target {names[0] if names else 'upcycle_moe'}",
        )
    return chosen


def _units(
    recipe: Recipe, family: Family, dense: DenseConfig, target: Target, shape: MoeShape, specs: Mapping[str, TensorSpec]
) -> list[Unit]:
    def dtype(origin: Origin) -> str:
        return origin.dtype(specs[origin.name].dtype if recipe.dtype == "keep" else recipe.dtype)

    def copied(shapes: Mapping[str, tuple[int, ...]]) -> list[OutputEntry]:
        origins = {name: target.origin(family, dense, name) for name in shapes}
        names = {name: family.module_paths.renamed(name, target.module_paths) for name in shapes}
        written = {name: target.written(dense, own) for name, own in names.items()}
        return [OutputEntry(written[name], TensorSpec(shapes[name], dtype(o)), o) for name, o in origins.items()]

    units = [Unit("embeddings", None, tuple(copied(family.first_specs(dense))))]
    for layer in range(dense.num_hidden_layers):
        entries = copied(target.layer_specs(family, dense, layer))
        if layer in shape.moe_layers:
            expert_dtype = family.ffn_dtype(dense, specs, layer, recipe.dtype)
            entries += [
                OutputEntry(
                    target.written(dense, tensor.name),
                    TensorSpec(tensor.shape, tensor.stored_dtype(expert_dtype)),
                    built=tensor,
                )
                for tensor in target.moe_tensors(dense, shape, layer, recipe.layout)
            ]
        else:
            entries += copied(family.ffn_specs(dense, layer))
        units.append(Unit(f"layer {layer}", layer, tuple(entries)))
    units.append(Unit("final norm", None, tuple(copied(target.last_specs(family, dense)))))
    if towers := family.tower_specs(dense):
        units.append(Unit("other parts", None, tuple(copied(towers))))
    return units
