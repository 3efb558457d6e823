"""Replaces the matrices of experts by products of two thin ones, in the metric of what they read."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import WRAPPED, Compression, CutSizes, wraps
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.layer_source import LayerSource, ModelSource
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

_PARTS = 1000  # of an expert's weights, in which those that are kept are counted
_STEP = 8  # ranks are multiples of it, where matrices are large enough
_SMALL = 64  # the largest rank that pays, below which they are not


class LowRankParameters(PluginParameters):
    """Parameters of :class:`LowRank`."""

    ranks: Literal["importance", "equal"] = Field(
        "importance",
        description="importance: every expert of a layer has the rank that its outputs on the text deserve; equal: all the same",
    )
    ridge: float = Field(
        1e-3,
        gt=0,
        description="what is added to the second moments of inputs, relative to their mean: for what the text left out",
    )


class LowRank(Compression):
    """Implements low-rank experts (MoE-I2: Yang et al. 2024, arXiv 2411.01016; MC-SMoE: Li et al. 2024, arXiv 2310.01334).

    A matrix W ``[out, in]`` that reads inputs of second moment C becomes ``A B`` of rank r, the one with the least
    ``||(W - A B) C^(1/2)||``: with ``W C^(1/2) = U S V^T``, ``A = U_r`` and ``B = U_r^T W``. C is that of the tokens that chose the
    expert; of a down projection, that of its neurons' activations times the router's weight. It pays where
    ``r (out + in) < out in``.

    ``keep`` is the part of every layer's expert weights that is kept. The ranks of its experts differ (``ranks=importance``): those
    directions of all experts are kept that add most to what the layer's tokens get, the squares of S.

    ``--target upcycle_moe`` holds the factors. Without it their product is stored in the place of the matrix, in the architecture of
    the MoE: that is as large and as slow as before, which the plan says.

    Deviations: gate and up are one matrix, one above the other, as both read the same. MoE-I2 gives ranks by the loss that an expert's
    absence causes, and decomposes weights without a metric; MC-SMoE decomposes what it merged, and adds a sparse part. Both then
    train; here the refit (``--refit down``) solves for the last factor.
    """

    name = "low_rank"
    title = "Low-rank experts"
    paper = "https://arxiv.org/abs/2411.01016"
    Parameters = LowRankParameters
    parameters: LowRankParameters
    wrapped = True
    factored = True

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the part of the experts' weights that is kept, in thousandths.

        Raises:
            UsageError: the recipe does not say, no rank is that small, or nothing would be smaller.
        """
        if recipe.keep is None:
            raise UsageError("low_rank needs to know which part of the experts' weights is kept", hint="--keep 0.5")
        keep = round(recipe.keep * _PARTS)
        if keep == _PARTS:
            return keep
        for limit in limits(model):
            if self._rank(keep, limit) < 1:
                raise UsageError(
                    f"keep {recipe.keep:g} of experts of {model.expert_width} neurons and hidden size {model.hidden_size} leaves rank "
                    f"0: ranks are multiples of {_step(limit)}, and {limit:.4g} pays no more",
                    hint=f"--keep {-(-_step(limit) * 100 // limit) / 100:g} or more",
                )
        if not wraps(model, recipe) and recipe.refit != "none":
            raise UsageError(
                "a refit would fill matrices of low rank again, and a stock class holds no factors",
                hint=f"--target {WRAPPED}, or --refit none",
            )
        return keep

    @staticmethod
    def _rank(keep: int, limit: float) -> int:
        """Return the rank that all experts have in the mean."""
        step = _step(limit)
        return int(keep * limit / _PARTS / step) * step

    def changed(self, model: MoeModel, keep: int) -> bool:
        """Return whether ranks are limited."""
        return keep < _PARTS

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result: those of the source."""
        return CutSizes.of(model)

    def like(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes with the width of whole experts of as many weights."""
        return CutSizes(model.experts, model.top_k, max(1, model.expert_width * keep // _PARTS))

    def before(self, model: MoeModel, keep: int) -> LayerCut:
        """Return a cut of equal ranks; others have the same sum."""
        every = LayerCut.keeping(range(model.experts))
        if keep == _PARTS:
            return every
        up, down = (self._rank(keep, limit) for limit in limits(model))
        return replace(every, ranks=((up, down),) * model.experts)

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        if keep == _PARTS:
            return "nothing", f"{model.experts} experts"
        up, down = (self._rank(keep, limit) for limit in limits(model))
        gone = f"experts' matrices have rank {up} (gate and up) and {down} (down) in the mean"
        return gone, f"{model.experts} experts of rank {up} and {down} in the mean"

    def remarks(self, model: MoeModel, recipe: Recipe, keep: int) -> tuple[str, ...]:
        """Say that products take the place of whole matrices, where the target is stock."""
        if keep == _PARTS or wraps(model, recipe):
            return ()
        return (
            f"this saves nothing: a '{model.family.name}' model stores the products of the thin matrices, as large and as slow as the "
            f"whole ones were; --target {WRAPPED} stores the thin ones",
        )

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        return self.decomposed(source, keep)[0]

    def decomposed(self, source: LayerSource, keep: int) -> tuple[LayerCut, dict[str, torch.Tensor]]:
        """Return the cut of a layer, and the factors of all its experts."""
        experts, first = source.seen.experts, source.matrices(0)
        width, hidden = first["gate"].shape
        found = [self._decomposed(source, expert) for expert in range(experts)]
        ranks = [
            self._ranks([spectra[kind] for spectra in (one[1] for one in found)], keep, _limit(*shape))
            for kind, shape in enumerate(((2 * width, hidden), (hidden, width)))
        ]
        pairs = tuple((up, down) for up, down in zip(*ranks, strict=True))
        factors: dict[str, list[torch.Tensor]] = {"up_in": [], "up_out": [], "down_in": [], "down_out": []}
        for (vectors, _, weights), pair in zip(found, pairs, strict=True):
            for part, basis, weight, rank in zip(("up", "down"), vectors, weights, pair, strict=True):
                factors[f"{part}_out"].append(basis[:, :rank].T.float())
                factors[f"{part}_in"].append((basis[:, :rank].T @ weight).float())
        every = LayerCut.keeping(range(experts))
        return replace(every, ranks=pairs), {name: torch.cat(rows).contiguous() for name, rows in factors.items()}

    def _decomposed(
        self, source: LayerSource, expert: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Return U, the squares of S, and W, of an expert's gate and up together and of its down projection, in fp64."""
        own = {name: matrix.double() for name, matrix in source.matrices(expert).items()}
        vectors, squares, weights = [], [], []
        for weight, moments in (
            (torch.cat([own["gate"], own["up"]]), input_moments(source, expert, own["gate"].shape[1])),
            (own["down"], neuron_moments(source, expert)),
        ):
            basis, values = directions(weight, moments, self.parameters.ridge)
            vectors.append(basis)
            squares.append(values)
            weights.append(weight)
        return vectors, squares, weights

    def _ranks(self, squares: list[torch.Tensor], keep: int, limit: float) -> list[int]:
        """Return the rank of every expert, given the squares of its singular values, largest first."""
        rank, step = self._rank(keep, limit), _step(limit)
        if self.parameters.ranks == "equal":
            return [rank] * len(squares)
        most = int(limit / step)  # beyond, the whole matrix is smaller
        blocks = torch.stack([own[: most * step].unflatten(0, (-1, step)).sum(1) for own in squares])
        total, ranks = rank // step * len(squares), [1] * len(squares)
        later = [(-gain, expert) for expert, own in enumerate(blocks[:, 1:].tolist()) for gain in own]
        # Sums of equal blocks fall, so that the largest of all are the first ones of every expert.
        for _, expert in sorted(later)[: total - len(squares)]:
            ranks[expert] += 1
        return [step * own for own in ranks]

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """See :class:`~upcycle.methods.compressing.base.Compression`."""
        found: dict[int, Cut] = {}
        for layer, own in source.layers.items():
            found[layer], factors = self.decomposed(own, keep)
            source.store(layer, factors)
        return found


def limits(model: MoeModel) -> tuple[float, float]:
    """Return the ranks below which factors of gate and up together, and of down, are smaller than the matrices."""
    return _limit(2 * model.expert_width, model.hidden_size), _limit(model.hidden_size, model.expert_width)


def _limit(rows: int, columns: int) -> float:
    return rows * columns / (rows + columns)


def _step(limit: float) -> int:
    return _STEP if limit >= _SMALL else 1


def directions(weight: torch.Tensor, moments: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the left singular vectors of ``W C^(1/2)``, and the squares of its singular values, largest first, in fp64.

    Args:
        weight: W ``[out, in]``.
        moments: C ``[in, in]``, or its diagonal.
        ridge: what is added to the diagonal, relative to its mean; of no moments, to 1.
    """
    diagonal = moments if moments.ndim == 1 else moments.diagonal()
    mean = diagonal.mean()
    added = ridge * (mean if mean > 0 else torch.ones((), dtype=torch.float64))
    if moments.ndim == 1:
        rooted = weight * (moments + added).sqrt()
    else:
        values, vectors = torch.linalg.eigh(moments)
        rooted = (weight @ vectors) * (values.clamp(min=0) + added).sqrt()  # a rotation of inputs moves no left vector
    basis, singular, _ = torch.linalg.svd(rooted, full_matrices=False)
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return basis * signs, singular.square()


def input_moments(source: LayerSource, expert: int, hidden: int) -> torch.Tensor:
    """Return the second moments of what an expert reads, fp64 ``[d, d]``: of its tokens, of all, or (unknown) all alike ``[d]``."""
    seen = source.seen.input_gram
    if not seen.numel():
        return torch.ones(hidden, dtype=torch.float64)
    if len(seen) > 1:
        return seen[expert].double()
    return seen[0].double() * (source.seen.load[expert] / source.seen.tokens.clamp(min=1))


def neuron_moments(source: LayerSource, expert: int) -> torch.Tensor:
    """Return the second moments of an expert's activations, fp64 ``[F, F]``, or ``[F]``, where their products are not known."""
    gram = source.seen.neuron_gram
    return gram[expert].double() if gram.numel() else source.seen.neurons[expert].double()
