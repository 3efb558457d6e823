"""Splits every expert into finer ones, of which fewer neurons run for a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut, Term
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.base import PREFERRED_MULTIPLE
from upcycle.methods.compressing.base import Compression, CutSizes
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.inside.widths import check_width_alone
from upcycle.methods.compressing.layer_source import ExpertTokens, LayerSource, Matrices, ModelSource
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.registry import load

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_PIECES = (4, 2, 3)  # how many finer experts are tried, in this order


class ResplitParameters(PluginParameters):
    """Parameters of :class:`Resplit`."""

    pieces: int | None = Field(
        None,
        ge=2,
        le=64,
        description="how many finer experts each expert becomes (default: 4, 2 or 3, the first that fits; with keep 1, where all run, "
        "only if given)",
    )
    splitter: Literal["weight_kmeans", "contiguous_split", "random_split"] = Field(
        "weight_kmeans", description="the method that groups the neurons of an expert"
    )
    sharpness: float = Field(
        0.5,
        ge=0,
        le=1,
        description="how much of the difference between the finer experts of one expert their router rows tell: 1 orders all by how "
        "much they add, but weighs them by that, too",
    )


class Resplit(Compression):
    """Implements hierarchical splitting of a MoE (CMoE, Pei et al. 2025, arXiv 2502.04416, section 4.4) in stock classes.

    Each of E experts of F neurons becomes S experts of F / S neurons; a token chooses the part ``keep`` of S K, where it chose K.
    The router row of a finer expert is that of its expert, ``r_e``, plus ``sharpness`` times a row of its own. With rows of zeros,
    all S finer experts of the K chosen ones are the S K of the largest scores, and each has the weight of its expert over S: with down
    projections times S, that is the same function. A softmax that is not normalised gives the same; sigmoids that are not need no
    factor, and normalised ones do.

    The own rows are ridge regressions, on the tokens that chose the expert, of ``log ||f_es(x)||``, less its mean over the S finer
    experts: as ``r_e x`` is the logarithm of the weight, up to what all experts have in common, the sum orders finer experts by
    ``w_e ||f_es(x)||``, what they add. Fits that do not help on held-out tokens are zeros.

    Deviations: the paper has a second router for each expert, read after the first, which no stock class holds; its rows are
    weights of one neuron each. A stock router weighs a finer expert by the score that chose it: where the own rows tell two finer
    experts apart, they weigh differently, too, which the refit of down makes up for on average (``sharpness`` is the compromise).
    The paper's experts keep neurons that always run, for which a stock class would need shared experts of another width.
    """

    name = "resplit"
    title = "Finer experts"
    paper = "https://arxiv.org/abs/2502.04416"
    Parameters = ResplitParameters
    parameters: ResplitParameters
    observes = False
    looks = False
    makes = frozenset({"router"})

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the number of finer experts that a token chooses; 0: the model stays as it is."""
        if recipe.keep is None:
            raise UsageError(
                "resplit needs to know which part of the neurons still runs for a token", hint="--keep 0.5"
            )
        if recipe.keep == 1 and self.parameters.pieces is None:
            return 0
        if model.family.clamped:
            raise RefusalError(
                f"{self.name} cannot split the experts of a '{model.family.name}' model: every expert adds a bias to its output, and "
                "finer ones would add it once each",
                hint="--method slim makes its experts narrower",
            )
        if model.family.sparse_mixer:
            raise RefusalError(
                f"{self.name} gives finer experts nearly equal logits, and SparseMixer, by which a '{model.family.name}' routes, "
                "divides weights among those that are near",
                hint="--method slim makes its experts narrower",
            )
        width, pieces = model.expert_width, self._pieces(model.expert_width)
        if width % (pieces * PREFERRED_MULTIPLE):
            fitting = [n for n in range(2, 65) if width % (n * PREFERRED_MULTIPLE) == 0]
            raise UsageError(
                f"experts of {width} neurons cannot be divided into {pieces} of a multiple of {PREFERRED_MULTIPLE} neurons",
                hint=f"--param pieces={fitting[-1] if fitting[-1] < pieces else fitting[0]}"
                if fitting
                else "experts of so few neurons stay as they are",
            )
        check_width_alone(model, self.name)
        keep = round(recipe.keep * model.top_k * pieces)
        if keep < 1 or (keep == model.top_k * pieces and recipe.keep < 1):
            raise UsageError(
                f"keep {recipe.keep:g} of {model.top_k * pieces} finer experts per token is {keep}",
                hint=f"--keep {(model.top_k * pieces - 1) / (model.top_k * pieces):.4g}, or more pieces",
            )
        return keep

    def _pieces(self, width: int) -> int:
        """Return how many finer experts an expert of ``width`` neurons becomes."""
        fitting = [pieces for pieces in _PIECES if width % (pieces * PREFERRED_MULTIPLE) == 0]
        return self.parameters.pieces or (fitting or [_PIECES[0]])[0]

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result."""
        if not keep:
            return CutSizes.of(model)
        pieces = self._pieces(model.expert_width)
        return CutSizes(model.experts * pieces, keep, model.expert_width // pieces)

    def before(self, model: MoeModel, keep: int) -> LayerCut:
        """Return the cut into runs of neurons."""
        if not keep:
            return LayerCut.keeping(range(model.experts))
        width = model.expert_width // self._pieces(model.expert_width)
        runs = [tuple(range(first, first + width)) for first in range(0, model.expert_width, width)]
        return self._cut(model.experts, [runs] * model.experts, self._scale(model, model.expert_width, keep))

    def _scale(self, of: MoeModel | LayerSource, width: int, keep: int) -> float:
        """Return what down projections are multiplied by; where all finer experts of the chosen run, it is S, or 1."""
        if of.normalized:
            return keep / of.top_k
        return 1.0 if of.sigmoid else float(self._pieces(width))

    def _cut(self, experts: int, groups: list[list[tuple[int, ...]]], scale: float) -> LayerCut:
        terms = tuple((Term(expert, order=own),) for expert in range(experts) for own in groups[expert])
        return LayerCut(terms, tuple(expert for expert in range(experts) for _ in groups[expert]), scale=scale)

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what no longer runs, and what the result is."""
        if not keep:
            return "nothing is cut", f"{model.experts} experts, top-{model.top_k}"
        sizes = self.sizes(model, keep)
        part = keep / (model.top_k * self._pieces(model.expert_width))
        return (
            f"{part:.0%} of the neurons that ran for a token still do",
            f"{sizes.experts} experts of {sizes.width} neurons, top-{keep}, from {model.experts} of {model.expert_width}, "
            f"top-{model.top_k}",
        )

    def unobserved(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """Decide every layer by the weights of its experts."""
        if not keep:
            return super().unobserved(source, keep)
        model = source.model
        scale = self._scale(model, model.expert_width, keep)
        found: dict[int, Cut] = {}
        for layer in model.moe_layers:
            groups = [self._groups(layer, source.matrices(layer)(e), source.seed) for e in range(model.experts)]
            found[layer] = self._cut(model.experts, groups, scale)
        return found

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """Decide one layer likewise."""
        if not keep:
            return LayerCut.keeping(range(source.seen.experts))
        groups = [self._groups(source.layer, source.matrices(e), source.seed) for e in range(source.seen.experts)]
        scale = self._scale(source, len(source.seen.neurons[0]), keep)
        return self._cut(source.seen.experts, groups, scale)

    def _groups(self, layer: int, matrices: dict[str, torch.Tensor], seed: int) -> list[tuple[int, ...]]:
        """Return the neurons of every finer expert of an expert, ascending."""
        import torch

        from upcycle.ffn.feed_forward import FeedForward
        from upcycle.ffn.random_weights import stream

        cls = load("method", self.parameters.splitter)
        splitter = cls(cls.Parameters())
        ffn = FeedForward(layer, norm=torch.ones(matrices["up"].shape[1]), activation="silu", **matrices)
        neurons = torch.arange(ffn.intermediate_size)
        # The name of an expert would be its number: experts in another order would be split otherwise.
        pieces = self._pieces(len(neurons))
        labels = splitter.labels(neurons, pieces, ffn, stream(seed, layer, "resplit"), None)
        return [tuple(neurons[labels == piece].tolist()) for piece in range(pieces)]

    def made(
        self, cut: LayerCut, keep: int, rows: torch.Tensor, tokens: Callable[[int], ExpertTokens], matrices: Matrices
    ) -> dict[str, torch.Tensor]:
        """Return the router: for every finer expert the row of its expert, and its own; see the class."""
        import torch

        made = rows[list(cut.rows)].double()
        for expert in range(len(rows)):
            places = [place for place, row in enumerate(cut.rows) if row == expert]
            down = matrices(expert)["down"]
            orders: list[Any] = [cut.experts[place][0].order for place in places]
            seen = tokens(expert)
            norms = torch.stack([(seen.hidden[:, order] @ down[:, order].T).norm(dim=1) for order in orders], 1)
            made[places] += self.parameters.sharpness * own_rows(seen, norms)
        return {"router": made.float()}


def own_rows(seen: ExpertTokens, norms: torch.Tensor) -> torch.Tensor:
    """Return rows, fp64 ``[S, d]``, whose products with x tell the logarithms of norms ``[t, S]`` apart; zeros where none helps."""
    import torch

    from upcycle.ffn.ridge_sums import RidgeSums

    logs = norms.double().clamp(min=1e-30).log()
    targets = logs - logs.mean(1, keepdim=True)
    sums = RidgeSums(seen.x.shape[1], norms.shape[1])
    for held in (False, True):
        taken = seen.held == held
        if bool(taken.any()):
            sums.add(seen.x[taken], targets[taken], torch.ones(int(taken.sum())), held_out=held)
    if not bool((~seen.held).any()):
        return torch.zeros(norms.shape[1], seen.x.shape[1], dtype=torch.float64)
    choice = sums.best()
    if not sums.finite or not choice.held_out_loss < 1:
        return torch.zeros(norms.shape[1], seen.x.shape[1], dtype=torch.float64)
    rows: torch.Tensor = sums.solve(choice.strength).weights.T
    return rows - rows.mean(0)
