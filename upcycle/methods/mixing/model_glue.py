"""Model-GLUE: alike models of a zoo are merged, and the merges become the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from upcycle.architectures.moe.base import MoeShape
from upcycle.errors import UsageError
from upcycle.methods.base import Merges
from upcycle.methods.mixing.branch_train_mix import BranchTrainMix, BranchTrainMixParameters
from upcycle.recipe.conversion_recipe import Recipe, SourceRecipe

if TYPE_CHECKING:
    import torch

    from upcycle.checkpoints.mixed_checkpoint import Mix, MixedCheckpoint
    from upcycle.conversion.decide_merges import Measured
    from upcycle.progress import Progress


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
    """Zhao et al., NeurIPS 2024 Datasets and Benchmarks, arXiv 2410.05357, and its code (``merging/heuristic_merge.py``).

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
        """See the class.

        Raises:
            UsageError: the coefficients are no merges.
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
        """Unless there are coefficients."""
        return self.parameters.coefficients is None

    def decide(
        self,
        checkpoint: MixedCheckpoint,
        recipe: Recipe,
        windows: torch.Tensor,
        measured: Measured,
        progress: Progress,
    ) -> tuple[list[list[float]], dict[str, Any]]:
        """See the class and :func:`~upcycle.methods.mixing.glue.glue`."""
        from upcycle.methods.mixing.glue import glue

        return glue(checkpoint, recipe, windows, self.parameters, measured, progress)

    def join(self, mix: Mix | None) -> None:
        """Take at least two sources; for differences, a base that is none of them."""
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

    def told(self, sources: Sequence[SourceRecipe]) -> list[SourceRecipe]:
        """Of a merge all that is said of its sources."""
        if self.merges is None:
            return list(sources)
        return [_together([s for s, part in zip(sources, row, strict=True) if part]) for row in self.merges]

    def sizes(self, experts: int | None, top_k: int | None) -> tuple[int, int]:
        """As many experts as clusters; until there are any, as sources."""
        if self.parameters.coefficients is None and experts is not None:
            raise UsageError(
                f"{self.name} makes as many experts as it finds clusters, and {experts} are asked for",
                hint="leave --experts out; a higher --param threshold makes more clusters",
            )
        return super().sizes(experts, top_k)

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """As many models as there turn out to be."""
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
