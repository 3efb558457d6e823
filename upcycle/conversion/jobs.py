"""Lists the kinds of conversions, and finds the job of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.conversion.add_conversion import AddConversion
from upcycle.conversion.beside_conversion import BesideConversion
from upcycle.conversion.compress_conversion import CompressConversion
from upcycle.conversion.expert_conversion import ExpertConversion
from upcycle.conversion.growth_conversion import GrowthConversion
from upcycle.conversion.job import ConversionJob
from upcycle.conversion.narrow_conversion import NarrowConversion
from upcycle.conversion.prune_conversion import PruneConversion
from upcycle.methods.base import AnyMethod
from upcycle.planning.cost import Plan
from upcycle.planning.job import method_of
from upcycle.planning.loadable import check_config, check_loadable
from upcycle.planning.open_sources import all_local, open_sources
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from upcycle.recipe.recipe_keywords import RecipeKeys

JOBS: dict[str, type[ConversionJob]] = {
    "copies": ExpertConversion,
    "partition": ExpertConversion,
    "overlap": ExpertConversion,
    "pruning": PruneConversion,
    "growth": GrowthConversion,
    "addition": AddConversion,
    "compression": CompressConversion,
    "narrowing": NarrowConversion,
    "beside": BesideConversion,
}
"""The job's class, by the ``kind`` of its method."""


def job_for(recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> ConversionJob:
    """Plan a recipe on an opened checkpoint. No argument is changed.

    Args:
        recipe: the user's recipe.
        method: the recipe's method (:func:`upcycle.planning.job.method_of`).
        checkpoint: the recipe's sources (:func:`upcycle.planning.open_sources.open_sources`).

    Raises:
        UsageError: the recipe cannot be carried out on this model.
        RefusalError: no stock architecture holds the result.
    """
    job: ConversionJob = JOBS[method.kind].of_checkpoint(recipe, method, checkpoint)
    return job


def job_of(recipe: Recipe) -> ConversionJob:
    """Plan a recipe from local checkpoints' headers, or from the ``config.json`` of hub repositories.

    As before a conversion, this checks that stock transformers loads the sources and the result; of a hub repository, only
    ``config.json`` is checked.

    Raises:
        UpcycleError: whatever :func:`upcycle.convert` would refuse before reading weights.
    """
    method = method_of(recipe)
    if all_local(recipe):
        checkpoint = open_sources(recipe, method)
        job = job_for(recipe, method, checkpoint)
        check_loadable(job, checkpoint)
        return job
    job = JOBS[method.kind].of_configs(recipe, method)
    check_config(job.config, "the result")
    return job


def plan(source: str | None = None, **keys: Unpack[RecipeKeys]) -> Plan:
    """Work out what a conversion would write and cost, without reading a weight.

    Args:
        source: local folder, hub id, ``.gguf`` file or ``demo``. Of a hub id only ``config.json`` is downloaded.
        **keys: recipe keys (:class:`upcycle.recipe.conversion_recipe.Recipe`), which editors complete.

    Raises:
        UpcycleError: whatever :func:`upcycle.convert` would refuse before reading weights.
    """
    content: dict[str, Any] = {**keys, **({"source": source} if source else {})}
    return job_of(parse_recipe(content, "recipe")).cost()
