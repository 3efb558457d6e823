"""Alternating split: neurons go where a linear router finds them, and the router follows."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import linear, normalize

from upcycle.ffn.activations import Activations, required
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.ffn.ridge_sums import solve_ridge
from upcycle.ffn.router_capture import of_largest
from upcycle.methods.base import filled
from upcycle.plugins import PluginParameters
from upcycle.splitters.grouping.balanced_assignment import balanced_assignment
from upcycle.splitters.grouping.balanced_kmeans import balanced_kmeans
from upcycle.splitters.grouping.neuron_profiles import draw_seed
from upcycle.splitters.grouping.plain_sum import PlainSumPartition


class AlternatingParameters(PluginParameters):
    """Parameters of :class:`Alternating`."""

    rounds: int = Field(2, ge=0, le=100, description="how often neurons and router are fitted to each other")
    tokens: int = Field(16384, ge=1, description="the split looks at about this many tokens; router and refit at all")
    strength: float = Field(1e-3, gt=0, description="ridge of the inner router, relative to the inputs' mean square")


class Alternating(PlainSumPartition):
    """Our own split: it maximises what the chosen experts add, over partitions and linear routers together.

    Let ``c_j(t) = |h_j(t)| * ||down_j||`` be what neuron j adds to token t. A linear router can only find what is linear in
    its input x, so neurons are first clustered by what a ridge regression predicts of their ``c_j``: with
    ``G = sum x x^T = L L^T`` the predicted profiles have the inner products of ``L^-1 sum_t x c_j``, d numbers per neuron.
    Then, in turns:

    1. the router is the ridge regression of every expert's ``sum_j c_j`` from x (linear in the neurons: no pass over the tokens);
    2. the router chooses k experts for every token, and ``gain[j, e] = sum_t c_j(t)^2 [e chosen for t]`` is what neuron j
       would add in expert e. Shared experts are always chosen: there a neuron adds all it has. The balanced assignment of
       the greatest total gain decides who is shared and which expert the others join.

    Neither step can lower the captured energy for the other's last answer, except that step 1 minimises a squared error in
    its place. The best of all rounds is kept.
    """

    name = "alternating"
    title = "Alternating assignment and routing"
    paper = None  # our own; the docstring is its description
    calibrated = True
    Parameters = AlternatingParameters
    parameters: AlternatingParameters

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Cluster the predicted profiles: the first guess."""
        sums = _BatchSums(required(activations, self.name), ffn, self.parameters.tokens)
        return self._clusters(sums, neurons, experts, rng)

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Assign neurons and fit routers in turn, and keep the best assignment; see the class."""
        given = required(activations, self.name)
        sums = _BatchSums(given, ffn, self.parameters.tokens)
        pieces, size = shape.shared + shape.experts, shape.expert_size
        # Pieces 0..S-1 are the shared experts.
        piece = torch.zeros(ffn.intermediate_size, dtype=torch.long)
        order = sums.energy.argsort(descending=True, stable=True)
        shared, routed = order[: shape.shared * size], order[shape.shared * size :].sort().values
        piece[shared] = torch.arange(len(shared)) // size
        piece[routed] = shape.shared + self._clusters(sums, routed, shape.experts, rng)
        best, captured = piece, -1.0
        gain, prices = torch.empty(0), None
        for rounds in range(self.parameters.rounds + 1):
            if rounds:
                piece, prices = balanced_assignment(-gain / gain.mean().clamp(min=1e-30), prices=prices)
            gain = self._gain(sums, given, piece, shape)
            now = gain.gather(1, piece[:, None]).sum().item()
            if now > captured:
                best, captured = piece, now
        members = [(best == number).nonzero().flatten() for number in range(pieces)]
        specs = [ExpertSpec(filled(neurons, size)) for neurons in members]
        return LayerBlueprint(ffn.layer, tuple(specs[shape.shared :]), shape.top_k, scale, tuple(specs[: shape.shared]))

    def _clusters(self, sums: _BatchSums, neurons: torch.Tensor, experts: int, rng: torch.Generator) -> torch.Tensor:
        predicted = sums.predicted(self.parameters.strength)[neurons]
        profiles = predicted / sums.energy[neurons].sqrt().clamp(min=1e-30)[:, None]
        return balanced_kmeans(profiles.float(), experts, seed=draw_seed(rng))

    def _gain(self, sums: _BatchSums, activations: Activations, piece: torch.Tensor, shape: MoeShape) -> torch.Tensor:
        """Return fp32 ``[F, S + E]``: what each neuron would add in each piece under the router that fits ``piece`` best."""
        member = torch.zeros(len(piece), shape.experts, dtype=torch.float64)
        routed = (piece >= shape.shared).nonzero().flatten()
        member[routed, piece[routed] - shape.shared] = 1.0
        moment = sums.moment @ member
        moment -= moment.mean(1, keepdim=True)  # what all experts share changes no choice
        rows = solve_ridge(sums.gram, moment, self.parameters.strength).weights.T.float()
        gain = torch.zeros(len(piece), shape.experts)
        for batch in activations.some(self.parameters.tokens):
            chosen = of_largest(linear(batch.x, rows), shape.top_k)
            gain.addmm_(batch.hidden.square().T, chosen * batch.weight[:, None])
        gain *= sums.norms.square()[:, None].float()
        always = sums.energy.float()[:, None].expand(-1, shape.shared)
        return torch.cat([always, gain], dim=1)


class _BatchSums:
    """Sums over some batches, in fp64.

    Attributes:
        norms: ``[F]``, the length of every neuron's down column.
        gram: ``[d, d]``, the weighted sum of ``x x^T``.
        moment: ``[d, F]``, the weighted sum of inputs times contributions.
        energy: ``[F]``, the weighted sum of squared contributions.
    """

    def __init__(self, activations: Activations, ffn: FeedForward, tokens: int) -> None:
        d, width = ffn.hidden_size, ffn.intermediate_size
        self.norms = ffn.down.double().norm(dim=0)
        self.gram = torch.zeros(d, d, dtype=torch.float64)
        self.moment = torch.zeros(d, width, dtype=torch.float64)
        self.energy = torch.zeros(width, dtype=torch.float64)
        for batch in activations.some(tokens):
            # One batch is multiplied in fp32, batches are added in fp64.
            weighted = batch.x * batch.weight[:, None]
            self.gram += weighted.T @ batch.x
            self.moment += weighted.T @ batch.hidden.abs()
            self.energy += batch.weight @ batch.hidden.square()
        self.moment *= self.norms
        self.energy *= self.norms.square()

    def predicted(self, strength: float) -> torch.Tensor:
        """Return fp64 ``[F, d]``, whose inner products are those of the contributions that a ridge regression predicts."""
        regular = self.gram.clone()
        regular.diagonal().add_(strength * self.gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
        factor, fault = torch.linalg.cholesky_ex(regular)
        if fault:
            return normalize(self.moment.T, dim=1)
        predicted: torch.Tensor = torch.linalg.solve_triangular(factor, self.moment, upper=False).T
        return predicted
