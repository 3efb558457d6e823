"""Ridge regression from streamed sums: closed-form fits over more tokens than fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from upcycle.errors import CheckpointError

# Relative to the mean of the Gram matrix' diagonal. Norm weights make some inputs of a layer a thousand times larger than
# others, so that this mean lies far above what most directions carry: weak strengths must be tried, too.
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
UNJUDGED_STRENGTH = 1e-2  # where no token was held out to choose by
_POWER_STEPS, _POWER_VECTORS = 5, 8
_GRAM_BLOCK = 256
_JUDGED_TARGETS = 64  # strengths are compared on this many random combinations of the targets


class RidgeSolution(NamedTuple):
    """A fit: ``weights`` fp64 ``[M, N]``, and (if asked for) an estimate from below of the solved matrix' ``condition`` number."""

    weights: torch.Tensor
    condition: float | None


class ChosenStrength(NamedTuple):
    """A strength and the squared error it leaves on held-out tokens, as a share of the targets' squares."""

    strength: float
    held_out_loss: float


def solve_ridge(gram: torch.Tensor, moment: torch.Tensor, strength: float, condition: bool = False) -> RidgeSolution:
    """Minimise ``||Y - X W||^2 + strength * mean(diag G) * ||W||^2`` by a Cholesky factorisation in fp64.

    A Gram matrix that is singular to working precision (fewer tokens than features, and next to no strength) gets the
    least power of ten of its own rounding error on the diagonal that lets it be factorised.

    Args:
        gram: ``G = X^T X``, ``[M, M]``; left as it is.
        moment: ``X^T Y``, ``[M, N]``.
        strength: at least zero. Relative, so that the solution does not depend on the scale of X.
        condition: also estimate the condition number.

    Raises:
        CheckpointError: the sums are not finite.
    """
    gram, moment = gram.double(), moment.double()
    scale = gram.diagonal().mean().item()
    if scale == 0:  # no token, or all features zero: nothing is known, and the smallest solution is zero
        return RidgeSolution(torch.zeros_like(moment), 1.0 if condition else None)
    jitter = 0.0
    while jitter < 1.0:
        regular = gram.clone()
        regular.diagonal().add_((strength + jitter) * scale)
        factor, fault = torch.linalg.cholesky_ex(regular)
        weights = torch.cholesky_solve(moment, factor)
        if not fault and weights.isfinite().all():
            return RidgeSolution(weights, _condition(regular, factor) if condition else None)
        jitter = 10 * jitter or len(gram) * torch.finfo(torch.float64).eps
    raise CheckpointError(
        "a least-squares fit failed: the activations' squares on the calibration text are not finite",
        hint="convert the checkpoint in the dtype it was trained in",
    )


def _condition(matrix: torch.Tensor, factor: torch.Tensor) -> float:
    """Return the largest over the smallest eigenvalue of a positive matrix ``[M, M]``, each by subspace iteration.

    The fixed start gives the same number in every run, which LAPACK's estimators do not promise.
    """
    # Several vectors at once find the extreme eigenvalues in fewer steps than one.
    start = torch.randn(len(matrix), _POWER_VECTORS, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    condition = 1.0
    for step in (matrix.matmul, lambda vectors: torch.cholesky_solve(vectors, factor)):
        vectors, growth = start, 0.0
        for _ in range(_POWER_STEPS):
            vectors = step(torch.linalg.qr(vectors).Q)
            growth = torch.linalg.matrix_norm(vectors, 2).item()
        condition *= growth
    return max(1.0, condition)


class _Sums:
    """The sums of a regression, all fp64: ``gram`` ``[M, M]``, ``moment`` ``[M, N]`` and the targets' weighted ``square``."""

    def __init__(self, features: int, targets: int) -> None:
        self._gram = torch.zeros(features, features, dtype=torch.float64)
        self._symmetric = True
        self.moment = torch.zeros(features, targets, dtype=torch.float64)
        self.square = 0.0

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        # The Gram matrix is symmetric: only blocks on and above its diagonal are summed; the rest is filled in when it is read.
        for first in range(0, features.shape[1], _GRAM_BLOCK):
            block = features[:, first : first + _GRAM_BLOCK].T @ features[:, first:]
            self._gram[first : first + _GRAM_BLOCK, first:] += block
        self._symmetric = False
        self.moment += features.T @ targets
        self.square += targets.square().sum(dtype=torch.float64).item()

    def projected(self, mix: torch.Tensor) -> _Sums:
        """Return the sums of the targets ``Y mix``; the Gram matrix is shared."""
        few = _Sums(0, 0)
        few._gram, few.moment = self.gram, self.moment @ mix
        return few

    @property
    def gram(self) -> torch.Tensor:
        """The Gram matrix, fp64 ``[M, M]``, symmetric."""
        if not self._symmetric:
            self._gram.triu_()
            self._gram += self._gram.triu(1).T
            self._symmetric = True
        return self._gram

    def loss(self, weights: torch.Tensor) -> float:
        """Return ``||Y - X W||^2 / ||Y||^2``; zero targets count as fitted."""
        if self.square == 0:
            return 0.0
        return max(0.0, 1.0 - self.explained(weights, self.gram @ weights) / self.square)

    def subtract(self, weights: torch.Tensor) -> float:
        """Replace ``Y`` by ``Y - X W``; returns the new square over the old one, which is what :meth:`loss` says of ``W``."""
        products = self.gram @ weights
        before, self.square = self.square, max(0.0, self.square - self.explained(weights, products))
        self.moment -= products
        return self.square / before if before else 0.0

    def explained(self, weights: torch.Tensor, products: torch.Tensor) -> float:
        """Return ``||Y||^2 - ||Y - X W||^2``, given ``products = G W``."""
        return (weights * (2 * self.moment - products)).sum().item()


class RidgeSums:
    """Accumulates what a ridge regression needs; no token is kept. The sums are fp64.

    Args:
        features: the number M of inputs.
        targets: the number N of outputs.
        products: the dtype that a batch is multiplied in. fp32 takes half the time and is exact enough where no strength
            below about 1e-4 is considered.
    """

    def __init__(self, features: int, targets: int, products: torch.dtype = torch.float64) -> None:
        self._shape, self._products = (features, targets), products
        self._train = _Sums(features, targets)
        self._held_out: _Sums | None = None  # a second Gram matrix only once it is needed

    def add(self, features: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, held_out: bool = False) -> None:
        """Add tokens: ``features`` ``[t, M]``, ``targets`` ``[t, N]``, and the ``weight`` ``[t]`` of each token's squared error."""
        sums = self._train
        if held_out:
            sums = self._held_out = self._held_out or _Sums(*self._shape)
        features, targets = features.to(self._products), targets.to(self._products)
        if not bool((weight == 1).all()):
            root = weight.to(self._products).sqrt()[:, None]
            features, targets = features * root, targets * root
        sums.add(features, targets)

    @property
    def finite(self) -> bool:
        """Whether all targets were finite, and all features that were multiplied by them."""
        return all(
            math.isfinite(sums.square) and bool(sums.moment.isfinite().all())
            for sums in (self._train, self._held_out)
            if sums
        )

    def subtract(self, weights: torch.Tensor) -> float:
        """Replace the targets by what fp64 ``weights`` ``[M, N]`` leave of them, as if that had been added.

        Returns:
            The :meth:`loss` of ``weights``, a by-product.
        """
        left = self._train.subtract(weights)
        return left if self._held_out is None else self._held_out.subtract(weights)

    def solve(self, strength: float, everything: bool = True, condition: bool = False) -> RidgeSolution:
        """Fit all tokens, or (``everything`` false) those that were not held out; ``condition``: as in :func:`solve_ridge`."""
        gram, moment = self._train.gram, self._train.moment
        if everything and self._held_out is not None:
            gram, moment = gram + self._held_out.gram, moment + self._held_out.moment
        return solve_ridge(gram, moment, strength, condition)

    def loss(self, weights: torch.Tensor) -> float:
        """Return the squared error of fp64 ``weights`` ``[M, N]`` over the targets' squares, on held-out tokens if there are any."""
        return (self._held_out or self._train).loss(weights)

    def best(self, strengths: Sequence[float] = STRENGTHS) -> ChosenStrength:
        """Choose the strength whose fit to the other tokens has the least loss on held-out ones; among equals the strongest.

        The loss falls and then rises as the ridge weakens, so the search begins in the middle and goes where it falls.
        Without held-out tokens there is nothing to choose by, and the strength is ``UNJUDGED_STRENGTH``.
        """
        ordered = sorted(strengths, reverse=True) if self._held_out is not None else [UNJUDGED_STRENGTH]

        few = self._projected(_JUDGED_TARGETS)
        judge = few._held_out or few._train

        @cache
        def loss(number: int) -> float:
            """The held-out loss up to a constant, the square of the targets."""
            weights = few.solve(ordered[number], everything=False).weights
            return -judge.explained(weights, judge.gram @ weights)

        best = len(ordered) // 2
        while best > 0 and loss(best - 1) <= loss(best):
            best -= 1
        while best + 1 < len(ordered) and loss(best + 1) < loss(best):
            best += 1
        return ChosenStrength(ordered[best], self.loss(self.solve(ordered[best], everything=False).weights))

    def _projected(self, targets: int) -> RidgeSums:
        """Return the regression of ``targets`` random combinations of the targets, or this one if it has no more of them.

        Squared errors keep their expected size (Johnson and Lindenstrauss), and every solution costs less.
        """
        count = self._shape[1]
        if count <= targets:
            return self
        rng = torch.Generator().manual_seed(0)
        mix = torch.randn(count, targets, generator=rng, dtype=torch.float64) / targets**0.5
        few = RidgeSums(0, 0)
        few._train = self._train.projected(mix)
        few._held_out = self._held_out and self._held_out.projected(mix)
        return few
