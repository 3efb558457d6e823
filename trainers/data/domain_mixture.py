"""Which domain each row comes from: by fixed weights, or by weights that follow validation losses. D domains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.errors import UsageError
from upcycle.trainers.data.keyed_random import permutation, uniform
from upcycle.trainers.recipe.data_recipe import DynamicWeights

STRATUM = 256  # consecutive rows whose domains are drawn together, so that each such group has the domains' shares


def updated_weights(
    weights: Mapping[str, float], losses: Mapping[str, float], reference: Mapping[str, float], rule: DynamicWeights
) -> dict[str, float]:
    """The weights after a validation, which sum to 1, from the excess ``losses - reference`` in nats per token.

    - ``paper``: ``a <- a exp(rate max(0, excess))``, normalised (Sheared-LLaMA, arXiv 2310.06694, algorithm 1).
    - ``code``: ``a <- softmax(log a + rate excess)``, then ``(1 - floor) a + floor / D``, as LLaMA-MoE trains (arXiv 2406.16554).
    """
    names = list(weights)
    excess = np.array([losses[name] - reference[name] for name in names])
    if rule.form == "paper":
        excess = excess.clip(min=0)
    scores = np.log(np.array([weights[name] for name in names])) + rule.rate * excess
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    if rule.form == "code":
        shares = (1 - rule.floor) * shares + rule.floor / len(names)
    return dict(zip(names, (shares / shares.sum()).tolist(), strict=True))


class Mixture:
    """Draws the domain of each row of a run from the row's number."""

    def __init__(self, weights: Mapping[str, float], dynamic: DynamicWeights | None, seed: int) -> None:
        """Domains are sorted by name, so that their order in the recipe does not matter."""
        self.weights = {name: weights[name] for name in sorted(weights)}
        self.dynamic = dynamic
        self.reference = dict(dynamic.reference) if dynamic and dynamic.reference else None
        self._seed = seed

    def draw(self, first: int, count: int) -> NDArray[np.int64]:
        """The domains of ``count`` rows from number ``first`` on: ``[count]``, indices into the sorted names."""
        strata = range(first // STRATUM, -(-(first + count) // STRATUM))
        numbers = np.concatenate([self._stratum(stratum) for stratum in strata])
        at = first - strata.start * STRATUM
        bounds = np.cumsum(list(self.weights.values()))
        return np.searchsorted(bounds[:-1], numbers[at : at + count], side="right")

    def _stratum(self, stratum: int) -> NDArray[np.float64]:
        """``[256]``: one random number in each 256th of [0, 1), in random order."""
        order = permutation(STRATUM, self._seed, "mixture", stratum, "order")
        return (order + uniform(STRATUM, self._seed, "mixture", stratum, "within")) / STRATUM

    def observe(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Update dynamic weights from validation losses in nats per token, the same on every rank; returns the weights.

        Raises:
            UsageError: a domain's loss is missing or not finite, or there are no reference losses.
        """
        if self.dynamic is None:
            return dict(self.weights)
        if self.reference is None:
            raise UsageError(
                "dynamic weights have no reference losses", hint="set dynamic.reference: {DOMAIN: NATS} in the data"
            )
        self._checked(losses, "validation")
        self.weights = updated_weights(self.weights, losses, self.reference, self.dynamic)
        return dict(self.weights)

    def refer_to(self, losses: Mapping[str, float]) -> None:
        """Set the reference to the dense parent's losses on the same text, unless there is one already.

        Raises:
            UsageError: a domain's loss is missing or not finite.
        """
        if self.dynamic and self.reference is None:
            self.reference = self._checked(losses, "reference")

    def _checked(self, losses: Mapping[str, float], what: str) -> dict[str, float]:
        for name in self.weights:
            if not math.isfinite(losses.get(name, math.nan)):
                raise UsageError(
                    f"the {what} loss of domain '{name}' is {losses.get(name)}, and dynamic weights need a number"
                )
        return {name: float(losses[name]) for name in self.weights}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON that restores every bit."""
        return {"weights": dict(self.weights), "reference": self.reference}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.weights = {name: float(state["weights"][name]) for name in self.weights}
        self.reference = state["reference"]
