"""The job that prunes: a smaller dense model, whose FFNs are planned, decided and built as experts that always run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.towers.composite_target import check_part
from upcycle.checkpoints.output_layout import shards_of
from upcycle.errors import UsageError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.base import PREFERRED_MULTIPLE, AnyMethod, Method
from upcycle.planning.cost import Plan
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import check_calibrates, check_text, check_tokenizer
from upcycle.planning.kept_units import kept_units
from upcycle.planning.pruned_dense import PrunedDense
from upcycle.planning.split_sizes import width_step
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe, RefitKind, layer_selection, parse_size
from upcycle.routers.no_router import NoRouter

if TYPE_CHECKING:
    from upcycle.checkpoints.mixed_checkpoint import Mix

_KEYS = {
    *(
        "source",
        "revision",
        "method",
        "parameters",
        "active",
        "width",
        "layers",
        "calibration",
        "refit",
        "reconstruction",
    ),
    *("dtype", "max_shard_size", "tokenizer", "seed", "verification"),
    "part",
}


@dataclass(frozen=True)
class PruneJob(ExpertJob):
    """Describes a validated pruning: every layer is one shared expert, the kept neurons, and there is no router."""

    @property
    def recipe_keys(self) -> set[str]:
        """The recipe keys that a pruning reads."""
        return _KEYS

    @property
    def record(self) -> dict[str, Any]:
        """The keys that only this kind of conversion adds to ``upcycle.json``."""
        return {"target": self.target.name, "refit": self.refit}

    def cost(self) -> Plan:
        """Work out what the pruning will write and need, from headers alone."""
        plan, kept, step = super().cost(), self.shape.expert_size, width_step(self.dense.hidden_size)
        warnings = [
            f"only {plan.parameters_total / plan.parameters_dense:.0%} of the dense parameters are left: expect a drop in quality "
            "until the model is healed by continual pre-training"
        ]
        if kept % step:
            warnings.append(
                f"FFNs of {kept} neurons are not a multiple of {step}: hardware may not run them at full speed"
            )
        summary = f"{kept:,} of {self.dense.intermediate_size:,} neurons are kept in every layer"
        return replace(plan, summary=summary, warnings=[*warnings, *plan.warnings])


P = TypeVar("P", bound=PruneJob)


def prepare_pruning(
    kind: type[P],
    recipe: Recipe,
    method: AnyMethod,
    family: Family,
    dense: DenseConfig,
    raw: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    has_tokenizer: bool = True,
    mix: Mix | None = None,
    note: str | None = None,
) -> P:
    """Work out every output tensor of a pruning. No argument is changed.

    Args:
        kind: the class of the job to return.
        recipe: the user's recipe.
        method: the recipe's method.
        family: the architecture of the dense model.
        dense: its configuration.
        raw: its ``config.json``.
        specs: shape and dtype of each of its tensors.
        has_tokenizer: whether a tokenizer lies beside them.
        mix: the sources, where there are several.
        note: a remark of the source on how it is read, for the plan's warnings.

    Raises:
        UsageError: the recipe cannot be carried out on this model.
        RefusalError: the family cannot be calibrated.
    """
    check_part(family, recipe.parts)
    family.check_known_whole(method.name)
    check_tokenizer(recipe, has_tokenizer)
    method = method.joined(mix, recipe)
    assert isinstance(method, Method)
    layers, refit = _checked(recipe, method, dense)
    check_calibrates(family)
    width = kept_width(recipe, dense)
    recipe = recipe.model_copy(update={"active": None, "width": width, "layers": "all"})
    target, router = PrunedDense(family, raw), NoRouter(PluginParameters())
    shape = MoeShape(0, 0, 1, width, layers, form=dense.ffn_form)
    shards = shards_of(kept_units(recipe, family, dense, target, shape, specs), parse_size(recipe.max_shard_size))
    return kind(recipe, dense, family, target, method, router, router.name, shape, 1.0, refit, shards, specs, note=note)


def kept_width(recipe: Recipe, dense: DenseConfig) -> int:
    """Return how many neurons every FFN keeps: ``width``, or the part ``active`` of them, rounded to a width hardware has.

    Raises:
        UsageError: the recipe gives both or none, or the width is no smaller one that models run with.
    """
    size, width, step = dense.intermediate_size, recipe.width, width_step(dense.hidden_size)
    if (recipe.active is None) == (width is None):
        raise UsageError(
            f"{recipe.method}: active and width both say how many neurons are kept, and "
            + ("neither is given" if width is None else "both are given"),
            hint="--active 0.5, or --width N",
        )
    if recipe.active is not None:
        width = max(1, round(recipe.active * size / step)) * step
        if width >= size:
            raise UsageError(
                f"active {recipe.active:g} of {size} neurons is {width}, rounded to a multiple of {step}: nothing is pruned",
                hint=_widths_below(size) + (", or a smaller --active" if size > step else ""),
            )
        return width
    assert width is not None
    if width >= size:
        raise UsageError(
            f"width {width} is not smaller than the FFNs, which have {size} neurons", hint=_widths_below(size)
        )
    if width % PREFERRED_MULTIPLE:
        below = width // PREFERRED_MULTIPLE * PREFERRED_MULTIPLE
        near = [w for w in (below, below + PREFERRED_MULTIPLE) if 0 < w < size]
        raise UsageError(
            f"width {width} is not a multiple of {PREFERRED_MULTIPLE}",
            hint=f"the nearest: {' or '.join(f'--width {w}' for w in near)}" if near else _widths_below(size),
        )
    return width


def _widths_below(size: int) -> str:
    """Name the largest width that is smaller than an FFN of ``size`` neurons."""
    largest = (size - 1) // PREFERRED_MULTIPLE * PREFERRED_MULTIPLE
    return f"--width {largest} or less" if largest else f"FFNs of {size} neurons are too narrow to be pruned"


def _checked(recipe: Recipe, method: Method, dense: DenseConfig) -> tuple[tuple[int, ...], RefitKind]:
    """Return the layers, which are all, and what is refitted.

    Raises:
        UsageError: a key says something that a pruned model has not, or the text is missing.
    """
    if meaningless := sorted(recipe.model_fields_set - _KEYS):
        raise UsageError(
            f"{method.name} makes a smaller dense model without experts, and does not read the key '{meaningless[0]}'",
            hint=f"leave it out; it reads {', '.join(sorted(_KEYS - {'source', 'method'}))}",
        )
    layers = layer_selection(recipe.layers, dense.num_hidden_layers)
    if len(layers) < dense.num_hidden_layers:
        raise UsageError(
            f"layers: {method.name} prunes all layers, as a dense model has one intermediate_size for all of them; "
            f"got {recipe.layers!r}",
            hint="--layers all, or leave it out",
        )
    if recipe.refit == "scale":
        raise UsageError(
            f"refit: scale fits a factor on routed experts, and {method.name} makes none",
            hint="--refit down, blocks or none",
        )
    check_text(recipe, f"method {method.name}")
    return layers, "down" if recipe.refit == "auto" else recipe.refit
