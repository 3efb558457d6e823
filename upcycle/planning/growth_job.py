"""A validated growth step: every tensor of the result with its origin and its file, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.stored_moe import ExpertRows
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit, shards_of
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.growing.base import Choice, Described, Grown, Growth, Piece
from upcycle.planning.expert_job import CALIBRATION_HINT, check_tokenizer, method_of
from upcycle.recipe.conversion_recipe import Recipe, parse_size

if TYPE_CHECKING:
    import torch

    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.checkpoints.mixed_checkpoint import Mix
    from upcycle.progress import Progress

DECISION_FILE = "growth.json"
_KEYS = {"source", "revision", "method", "parameters", "max_shard_size", "tokenizer", "seed", "verification"}


@dataclass(frozen=True)
class GrowthJob:
    """The sibling of :class:`upcycle.planning.expert_job.Job` for steps that copy whole tensors."""

    recipe: Recipe
    method: Growth
    source: Described
    grown: Grown
    shards: tuple[Shard, ...]

    @property
    def units(self) -> Iterator[Unit]:
        """All units in the order they are written."""
        return (unit for shard in self.shards for unit in shard.units)

    @property
    def calibrated(self) -> bool:
        """Whether text is looked at."""
        return self.method.text_for is not None or self.method.undecided(self.recipe)

    @property
    def promise(self) -> tuple[str, str]:
        """``exact`` or ``approximate``, and why."""
        return self.grown.promise

    @property
    def family_name(self) -> str:
        """The architecture, the same before and after."""
        return str(self.source.raw["model_type"])

    @property
    def context(self) -> int:
        """The longest input in tokens."""
        return self.grown.context

    @property
    def vocab_size(self) -> int:
        """Of source and result."""
        return self.grown.vocab_size

    @property
    def config(self) -> dict[str, Any]:
        """The result's ``config.json``."""
        config = dict(self.grown.config)
        if self.recipe.dtype != "keep":
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.dtype
        return config

    @property
    def recipe_text(self) -> str:
        """The resolved recipe with the keys that the step reads."""
        return self.recipe.dump(known_keys(self.method))

    @property
    def record(self) -> dict[str, Any]:
        """What only this kind of conversion has to say in ``upcycle.json``."""
        return {"target": self.family_name, "growth": self.grown.summary}


def known_keys(method: Growth) -> set[str]:
    """The recipe keys that a step reads."""
    return _KEYS | method.keys | ({"sources"} if method.takes_sources else set())


def growth_method(recipe: Recipe, mix: Mix | None = None) -> Growth:
    """The recipe's growth step.

    Raises:
        UsageError: the recipe sets a key that means nothing here, or lacks the text that the step looks at.
    """
    method = method_of(recipe)
    assert isinstance(method, Growth)
    method.check_roles(recipe.sources)
    method.join(mix)
    known = known_keys(method)
    if meaningless := sorted(recipe.model_fields_set - known):
        raise UsageError(
            f"{method.name} copies whole tensors, and does not read the key '{meaningless[0]}'",
            hint=f"leave it out; it reads {', '.join(sorted(known - {'source', 'method'}))}",
        )
    if method.text_for and not recipe.calibration.texts:
        raise UsageError(f"{method.text_for} looks at text and needs some", hint=CALIBRATION_HINT)
    return method


def prepare_growth(recipe: Recipe, source: Described, has_tokenizer: bool = True, mix: Mix | None = None) -> GrowthJob:
    """Work out every output tensor of a growth step.

    Raises:
        UsageError: the recipe cannot be carried out on this model.
        RefusalError: the model is none that the step takes.
    """
    check_tokenizer(recipe, has_tokenizer)
    method = growth_method(recipe, mix)
    grown = method.grow(source, recipe)
    return _laid_out(recipe.model_copy(update=dict(grown.resolved)), method, source, grown)


def _laid_out(recipe: Recipe, method: Growth, source: Described, grown: Grown) -> GrowthJob:
    units = [Unit(piece.name, piece.layer, _entries(piece, recipe, source.specs)) for piece in grown.pieces]
    return GrowthJob(recipe, method, source, grown, shards_of(units, parse_size(recipe.max_shard_size)))


def _entries(piece: Piece, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> tuple[OutputEntry, ...]:
    def spec(origin: Origin) -> TensorSpec:
        stored = specs[origin.name]
        shape = (len(origin.taken), *stored.shape[1:]) if isinstance(origin, ExpertRows) else stored.shape
        return TensorSpec(shape, origin.dtype(stored.dtype if recipe.dtype == "keep" else recipe.dtype))

    return tuple(OutputEntry(name, spec(origin), origin) for name, origin in piece.tensors.items())


def decide_growth(
    job: GrowthJob, checkpoint: Checkpoint, windows: torch.Tensor | None, folder: Path, progress: Progress
) -> tuple[GrowthJob, dict[str, Any] | None]:
    """The job with what depends on weights and text decided, and what is to be said of the text.

    The decision is written to ``folder``; what an earlier run decided there is not decided again.
    """
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

    path = folder / DECISION_FILE
    if not path.exists():
        measured: dict[str, Any] = {}
        if isinstance(checkpoint, MoeCheckpoint) and (
            found := job.method.choose(checkpoint, job.recipe, windows, progress)
        ):
            choice, measured = found
            job = _chosen(job, choice)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**job.grown.made, **measured}) + "\n", encoding="utf-8")
        temporary.rename(path)
    if windows is None:
        return decided_growth(job, folder), None
    from upcycle.text.text_record import text_record

    return decided_growth(job, folder), text_record(job.recipe, windows)


def decided_growth(job: GrowthJob, folder: Path) -> GrowthJob:
    """The job as it was decided when ``folder`` was written."""
    experts = read_json(folder / DECISION_FILE).get("experts")
    return job if experts is None else _chosen(job, {int(layer): tuple(taken) for layer, taken in experts.items()})


def _chosen(job: GrowthJob, choice: Choice) -> GrowthJob:
    return _laid_out(job.recipe, job.method, job.source, job.method.grow(job.source, job.recipe, choice))


def growth_reports(folder: Path) -> list[dict[str, Any]]:
    """What was decided of every layer, by what; empty where nothing was."""
    content = read_json(folder / DECISION_FILE)
    utility = content.get("utility", {})
    return [
        {"layer": int(layer), "experts": taken, "utility": utility.get(layer)}
        for layer, taken in content.get("experts", {}).items()
    ]
