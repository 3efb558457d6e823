"""Distilled router: rows trained to tell which experts' neurons are active."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch.nn.functional import normalize

from upcycle.ffn.activations import Activations, TokenActivations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.ffn.router_capture import ExpertMap
from upcycle.routers.calibrated.base import CalibratedParameters, CalibratedRouter

_MINI_BATCH = 512
_CLAMP = 1e-3  # keeps the logits of targets finite


class DistilledParameters(CalibratedParameters):
    """Parameters of :class:`DistilledRouter`."""

    epochs: int = Field(4, ge=0, description="passes of training over the calibration tokens")
    learning_rate: float = Field(0.01, gt=0, description="Adam's learning rate")
    by_norm: bool = Field(True, description="multiply |h_j| by the norm of neuron j's column of the down projection")


class DistilledRouter(CalibratedRouter):
    """MoEfication's trained selector (arXiv 2110.01786) without its hidden layer.

    Targets are ``t_i = s_i / max s`` with the maximum over a mini-batch's tokens and experts, and ``s_i`` the activation
    mass of expert i; the loss is binary cross-entropy of ``sigmoid(x @ rows.T)``, averaged over the experts and, weighted,
    over the tokens; Adam; inputs have length one, which changes no token's choice.

    Deviations. The paper's selector is ``Linear(d -> E) -> tanh -> Linear(E -> E)``; a native target holds one linear map.
    It starts from the experts' weight centres; here from the ridge regression of the targets' logits. That is about as good
    as a linear map gets: on the demo model training adds half a percent at best, so there are 4 epochs, not 30. ``s_i`` sums
    ``|h_j|``, as SwiGLU's activations have both signs where ReLU's do not, and by default times ``||down_j||``.
    Mini-batches of 512, as in the paper, are shuffled within a batch of the calibration text. As there, a part of the
    tokens is kept from training, and the epoch whose choices have the largest share of the oracle's mass on it is taken,
    the start being one of them; at the layer's own top-k instead of 20% of the experts.
    """

    name = "distilled"
    title = "Distilled selector"
    paper = "https://arxiv.org/abs/2110.01786"
    Parameters = DistilledParameters
    parameters: DistilledParameters

    def directions(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Return fp32 ``[E, d]``."""
        if activations is None:
            raise self.needs_text()
        expert_map = ExpertMap(blueprint, ffn)
        spread = expert_map.matrix(expert_map.norms if self.parameters.by_norm else torch.ones_like(expert_map.norms))
        rows = _start(activations, spread).float()
        optimizer = torch.optim.Adam([rows], lr=self.parameters.learning_rate)
        best, kept = _captured_mass(activations, spread, rows, blueprint.top_k), rows.clone()
        for _ in range(self.parameters.epochs):
            for x, mass, weight in _mini_batches(activations, spread, rng):
                # The gradient of the weighted mean cross-entropy, written out: this works whether or not torch records gradients.
                slopes = (torch.sigmoid(x @ rows.T) - _relative(mass)) * weight[:, None]
                rows.grad = slopes.T @ x / slopes.numel()
                optimizer.step()
            share = _captured_mass(activations, spread, rows, blueprint.top_k)
            if share > best:
                best, kept = share, rows.clone()
        return kept


def _relative(mass: torch.Tensor) -> torch.Tensor:
    """Return ``mass`` ``[t, E]`` over its largest number."""
    return mass / mass.max().clamp(min=torch.finfo(mass.dtype).tiny)


def _mass(batch: TokenActivations, spread: torch.Tensor) -> torch.Tensor:
    return batch.hidden.abs() @ spread


def _start(activations: Activations, spread: torch.Tensor) -> torch.Tensor:
    """Return fp64 ``[E, d]``: the ridge regression of the targets' logits, where the loss of each token is least."""
    sums = RidgeSums(activations.ffn.hidden_size, spread.shape[1])
    for batch in activations.batches():
        logits = _relative(_mass(batch, spread)).double().logit(eps=_CLAMP)
        sums.add(normalize(batch.x), logits, batch.weight, batch.held_out)
    # Held-out tokens are left out: they judge whether training improves on this start.
    return sums.solve(sums.best().strength, everything=False).weights.T


def _mini_batches(
    activations: Activations, spread: torch.Tensor, rng: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield inputs of length one ``[t, d]``, mass ``[t, E]`` and weight ``[t]`` of the tokens that are not held out."""
    for batch in activations.batches():
        if not batch.held_out:
            x, mass = normalize(batch.x), _mass(batch, spread)
            for some in torch.randperm(len(x), generator=rng).split(_MINI_BATCH):
                yield x[some], mass[some], batch.weight[some]


def _captured_mass(activations: Activations, spread: torch.Tensor, rows: torch.Tensor, top_k: int) -> float:
    """Return the chosen experts' share of the oracle's mass, weighted, on held-out tokens (on all, if none are)."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in activations.judged():
        mass = _mass(batch, spread)
        chosen = mass.gather(1, (batch.x @ rows.T).topk(top_k, dim=1).indices)
        both = torch.stack([part.sum(1).double() for part in (chosen, mass.topk(top_k, dim=1).values)])
        sums += both @ batch.weight.double()
    mine, oracle = sums.tolist()
    return mine / oracle if oracle else 1.0
