"""Which projections of attention become experts, how large these are, and the tensors that are written for them (D2DMoE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.moe.base import Target
from upcycle.architectures.moe.wrapper import block_biases, block_tensors
from upcycle.architectures.projections import AttentionProjection, projections_in
from upcycle.architectures.stock import empty_model
from upcycle.architectures.towers.composite import CompositeFamily
from upcycle.checkpoints.output_layout import OutputEntry, Unit
from upcycle.errors import RefusalError, UsageError
from upcycle.ffn.activations import HELD_OUT_EVERY
from upcycle.ffn.form import FfnForm
from upcycle.ffn.moe_shape import MoeShape
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.base import Method
from upcycle.planning.job import check_calibrates, check_text
from upcycle.planning.routing_rule import router_form
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.routers.base import Router

_FORM = FfnForm("relu", gated=False, biases=frozenset({"up", "down"}))
_OFF = "leave 'projections' out: attention stays as it is"


@dataclass(frozen=True)
class ImitatedProjection:
    """A projection, and the block of experts that stands in its place.

    Attributes:
        place: the projection.
        module: the path of the module below the base model.
        width: neurons of the two-layer MLP, all experts together.
        shape: the numbers of its experts.
        entries: the tensors to write.
        gone: the stored tensors that are not written any more.
    """

    place: AttentionProjection
    module: str
    width: int
    shape: MoeShape
    entries: tuple[OutputEntry, ...]
    gone: frozenset[str]


def imitating_width(inputs: int, outputs: int, flops: float, experts: int) -> int:
    """Return how many neurons an MLP has that multiplies ``flops`` times as often as a projection, biases included.

    D2DMoE's formula for matrices of any shape, rounded to a multiple of ``experts``.
    """
    width = flops * (inputs * outputs + outputs) / (inputs + outputs + 1)
    return max(1, round(width / experts)) * experts


def imitated_projections(
    recipe: Recipe,
    family: Family,
    dense: DenseConfig,
    target: Target,
    method: Method,
    router: Router,
    shape: MoeShape,
    specs: Mapping[str, TensorSpec],
) -> tuple[ImitatedProjection, ...]:
    """Return the projections that become experts, layer by layer; none where the recipe asks for none.

    Raises:
        UsageError: the recipe has no text to learn from, or another method or rule than is known to work here.
        RefusalError: the model's projections are not known.
    """
    asked = recipe.projections
    if not asked.experts:
        return ()
    _check(recipe, family, target, method, shape)
    rule: Any = shape.rule
    if asked.tau is not None:
        rule = replace(rule, tau=asked.tau)
    model = empty_model(dense.raw, family.name)
    stored = {family.model_name(name): name for i in shape.moe_layers for name in family.stored_specs(dense, i)}
    layers, paths, found = family.module_paths.layers_in(model), family.module_paths, []
    for layer in shape.moe_layers:
        begin = paths.layer(layer)
        base = begin.removeprefix(f"{model.base_model_prefix}.")
        ffn = tuple(module.removeprefix(f"{base}.") for module in family.replaced_modules(layer))
        for place in projections_in(layers[layer], layer, ffn):
            name = f"{begin}.{place.path}"
            if f"{name}.weight" not in stored:
                raise RefusalError(f"{family.name}: the projection {name} is not stored under its own name", hint=_OFF)
            width = imitating_width(place.inputs, place.outputs, asked.flops, asked.experts)
            own = MoeShape(asked.experts, asked.experts, 0, width // asked.experts, (layer,), form=_FORM, rule=rule)
            own = replace(own, router=router_form(router, own))
            weight = specs[stored[f"{name}.weight"]].dtype if recipe.dtype == "keep" else recipe.dtype
            entries = tuple(
                OutputEntry(target.written(dense, one.name), TensorSpec(one.shape, weight), built=one)
                for one in block_tensors(name, place.inputs, place.outputs, own)
            )
            gone = frozenset(stored[part] for part in (f"{name}.weight", f"{name}.bias") if part in stored)
            found.append(ImitatedProjection(place, f"{base}.{place.path}", width, own, entries, gone))
    if not found:
        raise RefusalError(f"{family.name}: its layers have no projections of attention that are known here", hint=_OFF)
    return tuple(found)


def _check(recipe: Recipe, family: Family, target: Target, method: Method, shape: MoeShape) -> None:
    what = "projections: they become experts"
    if not target.keeps_names:
        raise RefusalError(
            f"{what} of upcycle_moe, and {target.name} has attention of its own", hint="--target upcycle_moe"
        )
    rule: Any = shape.rule
    if rule is None or not rule.compares_norms:
        raise UsageError(f"{what} that run by predicted norms", hint="--routing dynamic_k, or " + _OFF)
    if method.kind != "partition" or method.needs_gradients:
        raise UsageError(
            f"{what} as a split makes them, and {method.name} is another kind of method", hint="--method d2d"
        )
    if family.parts or isinstance(family, CompositeFamily):
        raise RefusalError(f"{what} in models of one part, and {family.name} has several", hint=_OFF)
    if family.pauses:
        raise RefusalError(
            f"{what} in models whose layers are run one by one, and those of a {family.name} model are no single row",
            hint=_OFF,
        )
    check_text(recipe, "projections")
    check_calibrates(family, None)
    if recipe.calibration.mode == "sequential":
        raise UsageError(
            "projections imitate those of the dense model on its own states, and calibration.mode is sequential",
            hint="--calibration-mode parallel",
        )


def with_imitated(units: Sequence[Unit], imitated: Sequence[ImitatedProjection]) -> list[Unit]:
    """Return the units with the experts' tensors in the place of the projections'."""
    found = []
    for unit in units:
        own = [one for one in imitated if one.place.layer == unit.layer]
        gone = {name for one in own for name in one.gone}
        kept = [entry for entry in unit.entries if entry.origin is None or entry.origin.name not in gone]
        found.append(replace(unit, entries=(*kept, *(entry for one in own for entry in one.entries))))
    return found


def with_entries(config: dict[str, Any], imitated: Sequence[ImitatedProjection]) -> dict[str, Any]:
    """Return a ``config.json`` with their entries in ``replaced_ffns``, one for all that are alike."""
    from upcycle.models.own.replaced_ffn import ReplacedFfn

    alike: dict[tuple[int, int, int], list[ImitatedProjection]] = {}
    for one in imitated:
        alike.setdefault((one.place.inputs, one.place.outputs, one.shape.expert_size), []).append(one)
    entries = [
        ReplacedFfn(
            paths=tuple((one.module,) for one in some),
            hidden_size=inputs,
            output_size=outputs,
            activation=_FORM.activation,
            gated=_FORM.gated,
            biases=block_biases(some[0].shape),
            widths=(size,) * some[0].shape.experts,
            shared_width=0,
            router_bias=some[0].shape.router.bias is not None,
            rule=some[0].shape.rule,  # type: ignore[arg-type]
            router=some[0].shape.router,
            projection=True,
        ).to_json()
        for (inputs, outputs, size), some in alike.items()
    ]
    return {**config, "replaced_ffns": [*config["replaced_ffns"], *entries]} if entries else config


def imitation_memory(imitated: Sequence[ImitatedProjection], recipe: Recipe) -> int:
    """Return the bytes that training the largest MLP holds, fp32: examples, hidden values of a batch, weights and moments."""
    asked, most = recipe.projections, 0
    for one in imitated:
        both = one.place.inputs + one.place.outputs
        tokens = min(asked.tokens, recipe.calibration.tokens) + recipe.calibration.tokens // HELD_OUT_EVERY
        # In fp64: the sums of the closed form, their factor and what it is solved for.
        closed = 8 * (2 * one.width * one.width + 2 * one.width * one.place.outputs)
        held = 4 * (2 * tokens * both + 4 * asked.batch * (one.width + both) + 4 * both * one.width)
        most = max(most, held + closed)
    return most


def imitation_bytes(imitated: Sequence[ImitatedProjection], recipe: Recipe) -> int:
    """Return the bytes of files: what the projections of one layer read, and the experts of all, until they are written."""
    read: dict[int, int] = {}
    for one in imitated:
        read[one.place.layer] = read.get(one.place.layer, 0) + 4 * recipe.calibration.tokens * one.place.inputs
    return max(read.values(), default=0) + sum(entry.spec.nbytes for one in imitated for entry in one.entries)


def projection_facts(imitated: Sequence[ImitatedProjection]) -> dict[str, Any]:
    """Return what ``upcycle.json`` says of them; empty: there are none."""
    if not imitated:
        return {}
    widths = sorted({one.width for one in imitated})
    return {"projections": {"count": len(imitated), "experts": imitated[0].shape.experts, "neurons": widths}}
