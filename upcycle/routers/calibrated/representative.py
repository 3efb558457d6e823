"""Representative router: one typical neuron speaks for each expert."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.neurons import Neurons
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.ffn.router_capture import ExpertMap
from upcycle.routers.calibrated.base import CalibratedParameters, CalibratedRouter
from upcycle.routers.calibrated.ridge import centred, fitted_rows


class RepresentativeParameters(CalibratedParameters):
    """Parameters of :class:`RepresentativeRouter`."""

    k_act: int = Field(10, ge=1, description="neurons marked as active per token")
    nearest: Literal["cosine", "l1"] = Field(
        "cosine", description="which neuron's marks are nearest the mean of its expert's: in L1 (CMoE), or by cosine"
    )


class RepresentativeRouter(CalibratedRouter):
    """CMoE's analytic router (arXiv 2502.04416), made linear.

    On every token the ``k_act`` neurons of largest ``|h|`` are marked, h being computed with x and the rows of gate and up at
    length one. An expert's representative r is the neuron whose marks are most like those of the whole expert, and its
    score is ``|act(g_r x) * (u_r x)|``, with rows of length one (``|act(u_r x)|`` where there is no gate, which CMoE's models
    all have). A bias is divided by the same lengths as its row and token are.

    Deviations. No native target holds that score, as it is not linear in x; the rows are the ridge regression of it (see
    ``ridge``, also for the bias). The paper takes the neuron whose column of marks is nearest the mean column of its
    expert in L1 (``nearest: l1``); as hardly any mark is shared by half of an expert, that is always one of the least
    marked neurons. By default it is the one whose column has the largest cosine with the mean column. Marks are recomputed
    from the calibration text, whatever method made the experts, and kept as counts instead of a tokens x neurons matrix.
    The bias that balances the load in training (``bias-speed``) is no part of a native router.
    """

    name = "representative"
    title = "Representative neurons"
    paper = "https://arxiv.org/abs/2502.04416"
    Parameters = RepresentativeParameters
    parameters: RepresentativeParameters

    def directions(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Return fp64 ``[E, d]``."""
        if activations is None:
            raise self.needs_text()
        chosen = representatives(activations, blueprint, self.parameters.k_act, self.parameters.nearest)
        score = Neurons(ffn, chosen, unit_rows=True)
        sums = RidgeSums(ffn.hidden_size, len(chosen))
        for batch in activations.batches():
            sums.add(batch.x, centred(score(batch.x).abs()), batch.weight, batch.held_out)
        return fitted_rows(sums)


def representatives(
    activations: Activations, blueprint: LayerBlueprint, k_act: int, nearest: Literal["cosine", "l1"]
) -> torch.Tensor:
    """Return int64 ``[E]``: of every expert the neuron whose marks are nearest to the mean of the expert's neurons.

    Held-out tokens are left out. An expert without any mark gets its first neuron, one of zero neurons alone neuron 0.
    """
    ffn, expert_map = activations.ffn, ExpertMap(blueprint, activations.ffn)
    neurons = Neurons(ffn, unit_rows=True)
    members = expert_map.matrix(torch.ones_like(expert_map.norms))
    k_act = min(k_act, ffn.intermediate_size)
    counts = torch.zeros(ffn.intermediate_size, dtype=torch.float64)
    together = torch.zeros(ffn.intermediate_size, expert_map.experts, dtype=torch.float64)
    for batch in activations.batches():
        if batch.held_out:
            continue
        size, marked = neurons.of_directions(batch.x).abs().topk(k_act, dim=1)
        marks = (size > 0).double()  # a silent neuron is not active, even where fewer than k_act others are
        counts.index_add_(0, marked.flatten(), marks.flatten())
        # How many marks each expert has at each token [t, E], added to every neuron marked at that token.
        of_expert = (members[marked] * marks[:, :, None]).sum(1)
        together.index_add_(0, marked.flatten(), (of_expert[:, None] * marks[:, :, None]).flatten(0, 1))
    if nearest == "cosine":
        likeness = together / counts.sqrt().clamp(min=1)[:, None]
    else:
        # Between marks c and a mean mu of marks, ||c - mu||_1 = sum c + sum mu - 2 c mu; sum mu is the same for all c.
        likeness = 2 * together / members.sum(0).clamp(min=1) - counts[:, None]
    mine = likeness.gather(0, expert_map.neurons.T).T  # [E, m]
    best = mine.masked_fill(~expert_map.present, -torch.inf).argmax(dim=1)
    return expert_map.neurons.gather(1, best[:, None])[:, 0]
