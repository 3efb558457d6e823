"""Ridge router: the linear rows that best predict, in closed form, how much each expert would contribute."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import linear

from upcycle.ffn.activations import Activations, TokenActivations
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.ffn.router_capture import ExpertMap, of_largest
from upcycle.routers.calibrated.base import CalibratedParameters, CalibratedRouter

RidgeTarget = Literal["contribution", "energy", "output_norm", "one_hot", "prior_approximate"]


class RidgeParameters(CalibratedParameters):
    """Parameters of :class:`RidgeRouter`."""

    target: RidgeTarget = Field(
        "contribution",
        description="what the rows predict: an expert's contribution (root of its energy), its energy, the norm of its "
        "output (D2DMoE), 1 for the k experts of largest energy (DUME), or for the k nearest the output (FactorLLM)",
    )
    tokens: int = Field(32768, ge=1, description="the rows are fitted to about this many tokens, if there are so many")


class RidgeRouter(CalibratedRouter):
    """Weighted ridge regression of a target from the router's input, as DUME fits its router (arXiv 2603.29765).

    The targets, and how they differ from their papers:

    - ``contribution``, ``energy``: ours. Energy is ``sum_j (h_j ||down_j||)^2`` over the expert's neurons; its root is less
      ruled by few tokens.
    - ``output_norm``: D2DMoE (arXiv 2310.04361) predicts ``||E_i(x)||_2`` by an MLP d -> 128 -> E with an absolute value at
      the end, trained by Adam, and executes as many experts as it takes. No native target holds an MLP or a varying k.
    - ``one_hot``: DUME regresses domain labels, one expert per token; here the labels are the k experts of largest energy.
    - ``prior_approximate``: FactorLLM (arXiv 2408.11855) labels the k experts of least ``MSE(E_i(x), k/E FFN(x))`` and
      trains a linear router with a bias, and the experts, by a KL divergence to the labels' softmax. Here the labels
      themselves are regressed, and FFN(x) is what the routed experts have to give: shared experts' output is taken off.
      With orthogonal outputs that error is ``(1 - 2k/E) ||E_i(x)||^2`` and a constant: below k = E/2, the paper's setting,
      it prefers the experts that contribute least, and captures less energy than random choices do. Kept for comparison.

    A native router has no bias. The fit has none either, on inputs that are not centred: RMSNorm's outputs have a nearly
    constant direction, which carries what a bias would. Targets are centred over each token's experts: what is common to
    all changes no choice. The ridge's strength is the one with the least squared error on held-out tokens, after a fit to
    the others; then all tokens are fitted.
    """

    name = "ridge"
    title = "Ridge regression"
    paper = "https://arxiv.org/abs/2603.29765"
    Parameters = RidgeParameters
    parameters: RidgeParameters

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
        expert_map = ExpertMap(blueprint, ffn)
        sums = RidgeSums(ffn.hidden_size, expert_map.experts)
        for batch in activations.some(self.parameters.tokens):
            target = targets(self.parameters.target, batch, blueprint, ffn, expert_map)
            sums.add(batch.x, centred(target), batch.weight, batch.held_out)
        return fitted_rows(sums)


def fitted_rows(sums: RidgeSums) -> torch.Tensor:
    """Return fp64 ``[E, d]``: the fit to all tokens, with the strength that does best on the held-out ones."""
    return sums.solve(sums.best().strength).weights.T


def centred(target: torch.Tensor) -> torch.Tensor:
    """Return ``target`` ``[t, E]`` less every token's mean over the experts, fp64."""
    return target.double() - target.double().mean(dim=1, keepdim=True)


def targets(
    kind: RidgeTarget, batch: TokenActivations, blueprint: LayerBlueprint, ffn: FeedForward, expert_map: ExpertMap
) -> torch.Tensor:
    """Return fp32 ``[t, E]``: what the rows are to predict for each token; see :class:`RidgeRouter`."""
    if kind == "output_norm":
        return expert_map.output_norms(batch.hidden)
    if kind == "prior_approximate":
        share = blueprint.top_k / expert_map.experts
        errors = expert_map.errors(batch.hidden, share * _left_to_routed(batch, blueprint, ffn))
        return of_largest(-errors, blueprint.top_k)
    energies = expert_map.energies(batch.hidden)
    if kind == "one_hot":
        return of_largest(energies, blueprint.top_k)
    return energies if kind == "energy" else energies.sqrt()


def _left_to_routed(batch: TokenActivations, blueprint: LayerBlueprint, ffn: FeedForward) -> torch.Tensor:
    """Return fp32 ``[t, d]``: the dense FFN's output less that of the shared experts and the down bias."""
    hidden = batch.hidden
    if blueprint.shared:
        shared = torch.cat([expert.neurons for expert in blueprint.shared])
        hidden = hidden.index_fill(1, shared[shared != ZERO_NEURON], 0.0)
    return linear(hidden, ffn.down.float())
