"""Model-GLUE: alike models of a zoo are merged, and the merges become the experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from upcycle.checkpoints.merged_checkpoint import weighted_mean
from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.errors import UsageError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.mixing.base import Merges
from upcycle.methods.mixing.branch_train_mix import BranchTrainMix, BranchTrainMixParameters
from upcycle.methods.mixing.log_likelihoods import log_likelihoods
from upcycle.methods.mixing.weight_similarity import similarities
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.recipe.recipe_parts import SourceRecipe
from upcycle.text.text_record import text_record

if TYPE_CHECKING:
    import torch

    from upcycle.checkpoints.mixed_checkpoint import Mix, MixedCheckpoint
    from upcycle.files.measured import MeasurementCache
    from upcycle.progress import Progress

MergeWeights = dict[int, float]  # source -> its coefficient in a merge; they sum to 1
_SEARCHED = tuple(i / 10 for i in range(1, 10))


class ModelGlueParameters(BranchTrainMixParameters):
    """Parameters of :class:`ModelGlue`."""

    threshold: float = Field(
        0.95,
        allow_inf_nan=False,
        description="sources join a cluster whose first member they resemble by more than this",
    )
    compare: Literal["weights", "deltas"] = Field(
        "weights", description="what is compared: the weights, or their differences from the recipe's source"
    )
    search: bool = Field(
        False, description="try coefficients 0.1 to 0.9 for every merge, instead of the running average alone"
    )
    coefficients: list[list[float]] | None = Field(
        None, description="a row per expert with every source's part in it, in place of deciding"
    )


class ModelGlue(BranchTrainMix):
    """Implements Model-GLUE (Zhao et al., NeurIPS 2024, arXiv 2410.05357), after its code ``merging/heuristic_merge.py``.

    Three steps. *Cluster*: a source joins the first cluster whose first member's attention and FFN it resembles (mean cosine
    of the columns, :func:`~upcycle.methods.mixing.weight_similarity.similarities`), or opens one. *Merge*: inside a cluster
    the sources are added to a running average one after another, best first; one that makes it worse is discarded. *Mix*: the
    merged models are mixed as :class:`BranchTrainMix` mixes sources, one expert each, in their average. A ``weight`` of a
    source counts there alone: a merge has the mean of its sources'.

    What is decided becomes the parameter ``coefficients`` of the written recipe.

    Deviations. Worth is the perplexity on the calibration text, not a sum of benchmark scores, and candidates come in its
    order alone. With ``search`` the best coefficient is kept: the released code keeps the last one tried. It also drops a
    model that resembles no family, where one is opened here. Merges are linear: SLERP, TIES, DARE and the evolutionary search
    are left out, as are mixtures of whole blocks or models, which no stock target holds.
    """

    name = "model_glue"
    title = "Model-GLUE"
    paper = "https://arxiv.org/abs/2410.05357"
    takes_roles = False
    Parameters = ModelGlueParameters
    parameters: ModelGlueParameters

    @property
    def merges(self) -> Merges | None:
        """The merges that ``coefficients`` describe; None: they are not decided yet.

        Raises:
            UsageError: the coefficients describe no merges.
        """
        rows = self.parameters.coefficients
        if rows is None:
            return None
        if len(rows) < 2 or not all(min(row, default=-1) >= 0 and 0 < sum(row) < float("inf") for row in rows):
            raise UsageError(
                f"parameters: 'coefficients' needs two rows or more of numbers that are 0 or positive, got {rows}",
                hint="a row for every expert with a number for every source, or leave it out",
            )
        return tuple(map(tuple, rows))

    def undecided(self, recipe: Recipe) -> bool:
        """Return whether there are no coefficients yet."""
        return self.parameters.coefficients is None

    def decide(
        self,
        checkpoint: MixedCheckpoint,
        recipe: Recipe,
        windows: torch.Tensor,
        measured: MeasurementCache,
        progress: Progress,
    ) -> tuple[list[list[float]], dict[str, Any]]:
        """Decide the merges as :func:`~upcycle.methods.mixing.model_glue.glue` does."""
        return glue(checkpoint, recipe, windows, self.parameters, measured, progress)

    def join(self, mix: Mix | None) -> None:
        """Take at least two sources; to compare differences, also a base that is none of them."""
        super().join(mix)
        if (
            self.parameters.coefficients is None
            and self.parameters.compare == "deltas"
            and mix
            and mix.base < mix.count
        ):
            raise UsageError(
                "compare=deltas takes differences from the recipe's source, and it is one of the sources",
                hint="set 'source' to the model that the sources were branched from",
            )

    def source_recipes(self, sources: Sequence[SourceRecipe]) -> list[SourceRecipe]:
        """Return an entry for every merge, with the prompts and texts of all its sources."""
        if self.merges is None:
            return list(sources)
        return [_together([s for s, part in zip(sources, row, strict=True) if part]) for row in self.merges]

    def sizes(self, experts: int | None, top_k: int | None) -> tuple[int, int]:
        """Return an expert per cluster, or per source until the clusters are decided."""
        if self.parameters.coefficients is None and experts is not None:
            raise UsageError(
                f"{self.name} makes as many experts as it finds clusters, and {experts} are asked for",
                hint="leave --experts out; a higher --param threshold makes more clusters",
            )
        return super().sizes(experts, top_k)

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Name the merges of different sources that the experts are."""
        if self.parameters.coefficients is None and self.mix is not None:
            return f"experts of merges of {self.mix.count} models; compared with the model 'source'"
        return super().inexact(shape, scale)


def _together(sources: list[SourceRecipe]) -> SourceRecipe:
    def every(lists: list[list[str]]) -> list[str]:
        return list(dict.fromkeys(item for one in lists for item in one))

    positive = every([source.positive_prompts for source in sources])
    negative = every([source.negative_prompts for source in sources])
    return SourceRecipe(
        name=" + ".join(source.name for source in sources),
        positive_prompts=positive,
        negative_prompts=[prompt for prompt in negative if prompt not in positive],
        text=every([source.texts for source in sources]) or None,
    )


@dataclass(frozen=True)
class Step:
    """Holds one attempt to merge: ``coefficient`` times the merge so far plus ``1 - coefficient`` times ``source``.

    It is ``kept`` where the perplexity is not above ``before``, that of the merge so far.
    """

    source: int
    coefficient: float
    before: float
    perplexity: float
    kept: bool


def clusters_of(similarity: torch.Tensor, threshold: float) -> list[list[int]]:
    """Cluster models in one pass: a model joins the first cluster whose first member it resembles, or opens a new one.

    Args:
        similarity: of every pair of models, fp64 ``[S, S]``.
        threshold: the similarity above which two models resemble each other.
    """
    families: list[list[int]] = []
    for model in range(len(similarity)):
        own = next((family for family in families if similarity[model, family[0]] > threshold), None)
        if own is None:
            families.append([model])
        else:
            own.append(model)
    return families


def merge_greedily(
    cluster: Sequence[int], alone: Mapping[int, float], perplexity: Callable[[MergeWeights], float], search: bool
) -> tuple[MergeWeights, list[Step]]:
    """Merge the sources of a cluster one after another, best first, and leave out those that raise the perplexity.

    Args:
        cluster: the sources.
        alone: the perplexity of each source.
        perplexity: measures the perplexity of a merge.
        search: take the best of the coefficients 0.1 to 0.9, instead of the running average's, ``(s + 1) / (s + 2)`` after s
            merges.

    Returns:
        The coefficients of the merge, and every attempt.
    """
    first, *candidates = sorted(cluster, key=lambda source: (alone[source], source))
    current, best, steps = {first: 1.0}, alone[first], []
    for source in candidates:
        tried = []
        for coefficient in _SEARCHED if search else (len(current) / (len(current) + 1),):
            row = {**{i: coefficient * weight for i, weight in current.items()}, source: 1 - coefficient}
            tried.append((perplexity(row), coefficient, row))
        found, coefficient, row = min(tried, key=lambda attempt: attempt[:2])
        steps.append(Step(source, coefficient, best, found, kept=found <= best))
        if steps[-1].kept:
            current, best = row, found
    return current, steps


def glue(
    checkpoint: MixedCheckpoint,
    recipe: Recipe,
    windows: torch.Tensor,
    parameters: ModelGlueParameters,
    measured: MeasurementCache,
    progress: Progress,
) -> tuple[list[list[float]], dict[str, Any]]:
    """Cluster the sources and merge every cluster.

    Returns:
        The coefficients, a row per cluster with a number per source, and the measurements that decided them, as plain data.

    Raises:
        UsageError: all sources are alike.
    """
    sources, base = checkpoint.sources, checkpoint.members[-1]
    names = [source.source.name for source in sources]
    origin = base if parameters.compare == "deltas" else None
    similarity = similarities(sources, origin, progress)
    clusters = clusters_of(similarity, parameters.threshold)
    if len(clusters) == 1:
        least = similarity[0].min().item()
        tell = "" if parameters.compare == "deltas" else "or compare=deltas, with their ancestor as the source, "
        raise UsageError(
            f"all {len(sources)} sources are alike: their {parameters.compare} resemble those of {names[0]} by {least:.4f} "
            f"or more, above the threshold {parameters.threshold:g}, and one cluster is one expert",
            hint=f"--param threshold={_between(least)} {tell}tells them apart; --method branch_train_merge makes one dense "
            "model of them",
        )

    def perplexity(row: MergeWeights) -> float:
        def measure() -> float:
            model = weighted_mean(recipe, base, {sources[i]: weight for i, weight in row.items()})
            return math.exp(-log_likelihoods(model, windows, recipe.dtype, progress).mean().item())

        return float(measured(repr(sorted(row.items())), measure))

    alone: dict[int, float] = {}
    coefficients, steps = [], []
    for number, cluster in enumerate(clusters):
        row: MergeWeights = {cluster[0]: 1.0}
        tried: list[Step] = []
        if len(cluster) > 1:
            alone |= {source: perplexity({source: 1.0}) for source in cluster}
            row, tried = merge_greedily(cluster, alone, perplexity, parameters.search)
        coefficients.append([row.get(source, 0.0) for source in range(len(sources))])
        steps += [{"cluster": number, **asdict(step)} for step in tried]
    report = {
        "sources": names,
        "compare": parameters.compare,
        "threshold": parameters.threshold,
        "similarity": similarity.tolist(),
        "clusters": clusters,
        "text": text_record(recipe, windows),
        "perplexity": [alone.get(source) for source in range(len(sources))],
        "steps": steps,
        "discarded": [step["source"] for step in steps if not step["kept"]],
    }
    return coefficients, report


def _between(similarity: float) -> str:
    """Return a threshold just above a similarity and below 1, with as few digits as possible."""
    digits = 3
    while digits < 15 and round(similarity, digits) + 10.0**-digits >= 1:
        digits += 1
    return f"{round(similarity, digits) + 10.0**-digits:.{digits}f}"
