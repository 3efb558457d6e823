"""FactorLLM's split: contiguous slices with FactorLLM's scale."""

from __future__ import annotations

from upcycle.methods.base import Scale
from upcycle.splitters.contiguous_split import ContiguousSplit


class Factor(ContiguousSplit):
    """The slices of FactorLLM (arXiv 2408.11855) at the strength FactorLLM runs them.

    Its layer is ``y = (E/k) * sum of the chosen experts``, each with weight one. With a router whose weights sum to 1, and
    are 1/k each, that is a factor E on the down projection: here the ``paper`` scale is the same as ``exact``, and the
    layer equals the dense one at K = E. The neurons are those of ``contiguous_split`` (as released: a shuffle is computed
    there but not used).

    FactorLLM's router learns which experts alone come nearest to the dense output (prior-approximate supervision): choose
    router ``ridge`` with target ``prior_approximate``.

    Deviations: nothing is distilled, the experts keep their dense weights; the router has no bias; shared experts, which
    FactorLLM does not have, take the first slices.
    """

    name = "factor"
    title = "FactorLLM split"
    paper = "https://arxiv.org/abs/2408.11855"

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return the scale of every partition; ``paper`` is E."""
        return super().scale("exact" if convention == "paper" else convention, experts, top_k, shared)
