"""Branch-Train-Merge: fine-tunes of one model averaged into one dense model, the seed of the next branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from upcycle.errors import UsageError
from upcycle.methods.growing.base import CopiedExperts, DenseGrowth, Described, Grown, Promise
from upcycle.methods.mixing.base import MixingMethod
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch

    from upcycle.checkpoints.mixed_checkpoint import Mix, MixedCheckpoint
    from upcycle.files.measured import MeasurementCache
    from upcycle.progress import Progress


class BranchTrainMergeParameters(PluginParameters):
    """Parameters of :class:`BranchTrainMerge`."""

    prior: Literal["fixed", "cached"] = Field(
        "fixed",
        description="fixed: the sources' weights; cached: from there it follows the posteriors of what was read",
    )
    decay: float = Field(0.3, gt=0, lt=1, description="what the cached prior keeps of itself after every sequence")
    most: int | None = Field(None, ge=1, description="keep only so many sources, those with the largest posteriors")
    coefficients: list[float] | None = Field(None, description="every source's part, in place of deciding")


class BranchTrainMerge(MixingMethod, DenseGrowth):
    """Implements Branch-Train-Merge (Li et al., arXiv 2208.03306): every weight is the weighted mean of the sources'.

    Without calibration text the sources' ``weight`` are the weights. With one, they are the prior ``p(D=j)``, and the weights
    are the posteriors of the sources on that text: ``p(D=j | x_<t)``, proportional to ``p(x_<t | D=j) p(D=j)``, averaged over
    all positions of all sequences (calibration windows). They become the parameter ``coefficients`` of the written recipe.

    Deviations. The paper's weights are the cached prior itself, a sum over sequences in which one counts ``decay`` times what
    the next does: with 0.3, the last three decide. Here ``cached`` says what the posteriors begin with, and their average
    counts all sequences alike. The paper also runs the sources as an ensemble, which no stock architecture holds.
    """

    name = "branch_train_merge"
    title = "Branch-Train-Merge"
    paper = "https://arxiv.org/abs/2208.03306"
    keys = frozenset({"dtype", "calibration"})
    Parameters = BranchTrainMergeParameters
    parameters: BranchTrainMergeParameters

    def join(self, mix: Mix | None) -> None:
        """Take at least two sources, and a coefficient for each where there are coefficients."""
        if mix is None or mix.count < 2:
            raise UsageError(f"{self.name} averages several sources, and there is one", hint="--sources A,B,C")
        given = self.parameters.coefficients
        if given is not None and (len(given) != mix.count or min(given) < 0 or not 0 < sum(given) < math.inf):
            raise UsageError(
                f"parameters: 'coefficients' needs {mix.count} numbers that are 0 or positive, one per source, got {given}",
                hint="leave it out, or say what each source weighs",
            )
        self.mix = mix

    def undecided(self, recipe: Recipe) -> bool:
        """Return whether there is a calibration text and no coefficients."""
        return self.parameters.coefficients is None and bool(recipe.calibration.texts)

    def decide(
        self,
        checkpoint: MixedCheckpoint,
        recipe: Recipe,
        windows: torch.Tensor,
        measured: MeasurementCache,
        progress: Progress,
    ) -> tuple[list[float], dict[str, Any]]:
        """Return the posteriors, and the measurements that decided them. One model is in memory at a time."""
        import torch

        from upcycle.methods.mixing.log_likelihoods import log_likelihoods
        from upcycle.methods.mixing.source_posteriors import largest, source_posteriors
        from upcycle.text.text_record import text_record

        def measure(number: int) -> list[list[float]]:
            return log_likelihoods(checkpoint.sources[number], windows, recipe.dtype, progress).tolist()

        logs = [measured(str(i), partial(measure, i)) for i in range(len(checkpoint.sources))]
        likelihoods = torch.tensor(logs, dtype=torch.float64)
        prior, chosen = [source.weight for source in recipe.sources], self.parameters
        posterior = source_posteriors(likelihoods, prior, chosen.prior, chosen.decay)
        report = {
            "sources": [source.source.name for source in checkpoint.sources],
            "prior": chosen.prior,
            "text": text_record(recipe, windows),
            "perplexity": likelihoods.mean((1, 2)).neg().exp().tolist(),
            "posterior": posterior.tolist(),
        }
        return largest(posterior, chosen.most).tolist(), report

    @property
    def rest(self) -> tuple[float, ...] | None:
        """The weights of the sources in every mean; see the class."""
        if self.mix is None:
            return None
        return (*(self.parameters.coefficients or self.mix.weights), 0.0)

    def layers(self, count: int) -> Sequence[int]:
        """Return all layers, in their order."""
        return range(count)

    def grow(self, source: Described, recipe: Recipe, choice: CopiedExperts | None = None) -> Grown:
        """Return the source's tensors; the checkpoint reads each as the mean of the sources."""
        assert self.rest is not None
        parts = self.rest[:-1]
        what = f"the mean of {sum(map(bool, parts))} models"
        return replace(super().grow(source, recipe, choice), summary=what, made={"coefficients": list(parts)})

    def promise(self, count: int) -> Promise:
        """Return ``exact`` where the sources are copies of one model, whose mean is that model; else ``approximate``."""
        if self.mix is not None and self.mix.alike:
            return "exact", "the sources hold the same numbers"
        return "approximate", "the mean of different models; compared with the model 'source'"
