"""Which neurons of all experts, run for every token, a dense FFN needs to put out what the MoE's layer does.

N neurons of E experts and shared ones, S sampled tokens, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from upcycle.architectures.expert_terms import SHARED_FFN
from upcycle.ffn.neurons import activation_function
from upcycle.methods.compressing.leverage import least_missed, regularized

if TYPE_CHECKING:
    from upcycle.methods.compressing.layer_source import LayerSource

MOST_CANDIDATES = 4096  # neurons among which is chosen: the work grows with the third power
RIDGE = 1e-2  # relative to the mean square of the candidates' activations


def neuron_scores(source: LayerSource) -> dict[int, torch.Tensor]:
    """Return what every neuron adds to a layer's output on the text, ``sum (w h)^2 ||down||^2``, fp64, by expert; shared ones last."""
    seen = source.seen
    squares = dict(enumerate(seen.neurons.double()))
    if len(seen.shared):
        squares[SHARED_FFN] = seen.shared.double()
    return {e: own * source.matrices(e)["down"].double().square().sum(0) for e, own in squares.items()}


def fitted_neurons(
    source: LayerSource,
    scores: Mapping[int, torch.Tensor],
    scales: Mapping[int, float],
    width: int,
    most: int = MOST_CANDIDATES,
) -> torch.Tensor:
    """Return the neurons that are left when those go, in rounds, without which a fit of the others misses least of the output.

    All candidates run on all sampled tokens, as in a dense FFN; down projections are fitted to what the MoE put out there; and then
    neurons go as in :func:`~upcycle.methods.compressing.leverage.least_missed`. Candidates are those of the largest scores,
    where there are more than ``most``.

    Args:
        source: the layer.
        scores: of :func:`neuron_scores`.
        scales: the mean weight of every expert.
        width: how many are left.
        most: how many are looked at, if the FFN is narrower.

    Returns:
        int64 ``[width]``, ascending: their places among all neurons in the order of ``scores``.
    """
    order = torch.sort(torch.cat([*scores.values()]), descending=True, stable=True).indices
    candidates = order[: max(width, most)].sort().values
    if len(candidates) == width:
        return candidates
    x, act = source.seen.sample_inputs, activation_function(source.activation)
    weights = source.seen.sample_weights
    target, active, first = torch.zeros(x.shape), [], 0
    for expert, own in scores.items():
        matrices = source.matrices(expert)
        hidden = act(x @ matrices["gate"].T) * (x @ matrices["up"].T)
        # Of shared experts no weight is known token by token; it is 1 in most architectures.
        weight = scales[expert] if expert == SHARED_FFN else weights[:, expert, None].float()
        target += weight * (hidden @ matrices["down"].T)
        inside = candidates[(candidates >= first) & (candidates < first + len(own))] - first
        active.append(hidden[:, inside])
        first += len(own)
    together = torch.cat(active, 1)  # [S, N]
    gram = (together.T @ together).double()
    down = torch.linalg.solve(regularized(gram, RIDGE), (together.T @ target).double())
    return candidates[least_missed(gram, down.T, width, RIDGE)]
