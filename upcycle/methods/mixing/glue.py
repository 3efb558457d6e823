"""Which sources of a zoo are merged before they are mixed: alike ones, as long as the merge predicts a text better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint, merged
from upcycle.conversion.record import text_record
from upcycle.errors import UsageError
from upcycle.methods.mixing.log_likelihoods import log_likelihoods
from upcycle.methods.mixing.weight_similarity import similarities
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    from upcycle.conversion.decide_merges import Measured
    from upcycle.methods.mixing.model_glue import ModelGlueParameters

Row = dict[int, float]  # source -> its coefficient in a merge; of sum 1
_SEARCHED = tuple(i / 10 for i in range(1, 10))


@dataclass(frozen=True)
class Step:
    """One attempt to merge: ``coefficient`` times what was merged before, the rest of 1 times ``source``.

    ``kept`` where the perplexity did not grow from ``before``.
    """

    source: int
    coefficient: float
    before: float
    perplexity: float
    kept: bool


def clusters_of(similarity: torch.Tensor, threshold: float) -> list[list[int]]:
    """The families of a zoo, in one pass: a model joins the first family whose first member it resembles by more than
    ``threshold``, and opens a new one where there is none.

    Args:
        similarity: ``[S, S]``.
        threshold: see above.
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
    cluster: Sequence[int], alone: Mapping[int, float], perplexity: Callable[[Row], float], search: bool
) -> tuple[Row, list[Step]]:
    """Merge the sources of a cluster one after another, best first, leaving out those that harm.

    Args:
        cluster: the sources.
        alone: the perplexity of each.
        perplexity: that of a merge.
        search: take the best of the coefficients 0.1 to 0.9, instead of that of a running average, ``(s + 1) / (s + 2)``
            after s merges.
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
    measured: Measured,
    progress: Progress,
) -> tuple[list[list[float]], dict[str, Any]]:
    """The coefficients of every cluster's merge, a row per cluster with a number per source, and what they were decided by.

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

    def perplexity(row: Row) -> float:
        def measure() -> float:
            model = merged(recipe, base, {sources[i]: weight for i, weight in row.items()})
            return math.exp(-log_likelihoods(model, windows, recipe.dtype, progress).mean().item())

        return float(measured(repr(sorted(row.items())), measure))

    alone: dict[int, float] = {}
    coefficients, steps = [], []
    for number, cluster in enumerate(clusters):
        row: Row = {cluster[0]: 1.0}
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
    """A threshold just above a similarity, in as few digits as lie between it and 1."""
    digits = 3
    while digits < 15 and round(similarity, digits) + 10.0**-digits >= 1:
        digits += 1
    return f"{round(similarity, digits) + 10.0**-digits:.{digits}f}"
