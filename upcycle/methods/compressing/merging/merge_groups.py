"""What methods that merge experts share: groups of experts, and their weighted means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle.architectures.expert_terms import LayerCut, Term

if TYPE_CHECKING:
    import torch

    from upcycle.methods.compressing.layer_source import LayerSource


def merged(
    groups: Sequence[Sequence[int]], use: torch.Tensor, orders: dict[int, tuple[int, ...]] | None = None
) -> LayerCut:
    """Return the cut whose experts are the means of groups, weighted by use.

    Every merged expert has the router row of its member of most use. Experts keep the order of these members.

    Args:
        groups: the members of every expert of the result.
        use: fp64 ``[E]``, how much each expert counts.
        orders: for experts whose neurons are reordered before they are added, the order.
    """
    found: list[tuple[int, tuple[Term, ...]]] = []
    for group in groups:
        total = float(use[list(group)].sum())
        first = max(group, key=lambda e: (float(use[e]), -e))
        share = {e: float(use[e]) / total if total > 0 else 1 / len(group) for e in group}
        members = sorted(group)
        terms = tuple(Term(e, share[e], (orders or {}).get(e)) for e in members if share[e] > 0 or len(group) == 1)
        if len(terms) == 1:
            terms = (Term(terms[0].expert),)
        found.append((first, terms))
    found.sort()
    return LayerCut(tuple(terms for _, terms in found), tuple(first for first, _ in found))


def aligned(source: LayerSource, reference: int, others: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Return the orders of the neurons of ``others`` in which they are most alike those of ``reference``.

    The sum of the products of matching neurons' weights, over all three matrices, is the largest that there is (an assignment).
    """
    from scipy.optimize import linear_sum_assignment

    own = source.matrices(reference)
    found: dict[int, tuple[int, ...]] = {}
    for expert in others:
        theirs = source.matrices(expert)
        alike = (
            sum(own[name] @ theirs[name].T for name in ("gate", "up") if name in own) + own["down"].T @ theirs["down"]
        )
        _, order = linear_sum_assignment(alike.numpy(), maximize=True)
        found[expert] = tuple(int(i) for i in order)
    return found
