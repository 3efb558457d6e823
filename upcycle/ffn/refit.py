"""Refit: closed-form update of a converted layer's down projections towards the dense model's output.

No published converter does this; it is the least-squares step of layer-wise pruning (OBC, arXiv 2208.11580; SparseGPT,
arXiv 2301.00774) applied to routed experts. With ``a(x)`` the activations of all N experts' neurons, zero where the router
did not choose the expert, and c the down bias (if there is one), the layer gives ``W a(x) + c``. The update D minimises

    sum_t w_t ||target_t - c - (W + D) a(x_t)||^2 + strength * mean(diag G) * ||D||^2,    G = sum_t w_t a(x_t) a(x_t)^T

where ``target`` is the dense model's layer output less the converted model's residual stream, so that a layer also makes
up for errors of the layers below. The strength is chosen on held-out batches, then all batches are used. The bias stays as
it is: every token gets all of it, whichever experts run (see :class:`~upcycle.ffn.expert_tensors.ExpertTensors`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from upcycle.errors import CheckpointError
from upcycle.ffn.activations import ExpertActivations, TokenActivations
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.ffn.router_capture import of_largest

REFIT_STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Refit:
    """What a fit did. Errors are relative: ``||target - output||^2 / ||target - c||^2`` over held-out tokens, c the down bias."""

    error_before: float
    error_after: float
    strength: float | None = None
    condition: float | None = None
    factor: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers that apply, as plain data."""
        return {key: value for key, value in vars(self).items() if value is not None}


class Applied(Protocol):
    """A decided layer as it computes: which of its N neurons are active, fp32 ``down`` ``[d, N]`` and ``bias`` ``[d]``."""

    down: torch.Tensor
    bias: torch.Tensor | None

    def active(self, batch: TokenActivations) -> torch.Tensor:
        """Return fp32 ``[t, N]``: activations, zero where they do not count."""


class Routing:
    """A layer under its router, as the converted model will compute it: N neurons, those of all experts, shared ones first.

    Chosen experts weigh the same, so the layer is the plain sum of its shared and chosen experts; by a rule that weighs them by the
    router's logits, they are multiplied by that.

    Args:
        blueprint: the layer's, with a router unless all its experts are shared; which neurons its experts hold.
        ffn: the dense layer, whose dtype the experts are stored in.

    Attributes:
        down: fp32 ``[d, N]``, the dense column of every neuron; zeros for zero neurons.
        bias: fp32 ``[d]``, the down bias, or ``None``.
    """

    def __init__(self, blueprint: LayerBlueprint, ffn: FeedForward) -> None:
        assert blueprint.router is not None or not blueprint.routed
        # Experts are chosen with the router's weights as they are stored.
        self._router = None if blueprint.router is None else blueprint.network.stored_as(ffn.dtype)
        self._top_k, self._experts, self._rule = blueprint.top_k, len(blueprint.routed), blueprint.rule
        every = self._rule.all_alike(self._experts, False) if self._rule else self._top_k == self._experts
        self._chooses, self._plain_scale = not every, blueprint.plain_scale
        self._always = len(blueprint.shared) * blueprint.intermediate_size
        self._size = blueprint.intermediate_size
        self._neurons = blueprint.neurons
        zero = self._neurons == ZERO_NEURON
        self._zero = zero if bool(zero.any()) else None
        self.down = self._columns(ffn.down)
        self.bias = None if ffn.down_bias is None else ffn.down_bias.float()

    def _columns(self, down: torch.Tensor) -> torch.Tensor:
        taken = down.float()[:, self._neurons.clamp(min=0)]
        return taken if self._zero is None else taken.masked_fill(self._zero, 0.0)

    def active(self, batch: TokenActivations) -> torch.Tensor:
        """Return fp32 ``[t, N]``: activations, times :meth:`chosen`."""
        taken = batch.hidden.index_select(1, self._neurons.clamp(min=0))
        if self._zero is not None:
            taken[:, self._zero] = 0.0
        if self._chooses:
            on = self.chosen(batch)
            taken[:, self._always :].view(len(taken), self._experts, self._size).mul_(on[:, :, None])
        return taken

    def chosen(self, batch: TokenActivations) -> torch.Tensor:
        """Return fp32 ``[t, E]``: 0 where an expert does not run, else 1, or its weight over that at equal logits if these differ."""
        assert self._router is not None
        logits = self._router.logits(batch.x)
        if self._rule is None:
            return of_largest(logits, self._top_k)
        return self._rule.gates(logits) / self._rule.equal_weight(self._experts)

    def stored(self, blueprint: LayerBlueprint) -> torch.Tensor:
        """Return fp32 ``[d, N]``: what multiplies :meth:`active` in the finished model, factors included."""
        down = self.down if blueprint.down is None else blueprint.down.float()
        factor = blueprint.scale / self._plain_scale if self._experts else 1.0
        if factor == 1.0:
            return down
        return torch.cat([down[:, : self._always], down[:, self._always :] * factor], dim=1)

    def parts(self, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output ``[t, d]`` of the shared experts, and that of the chosen ones, summed; neither with the bias."""
        shared, routed = active[:, : self._always], active[:, self._always :]
        return linear(shared, self.down[:, : self._always]), linear(routed, self.down[:, self._always :])


def fit_down(
    start: Applied, active: ExpertActivations, targets: Iterable[torch.Tensor], everything: bool = True
) -> tuple[torch.Tensor, Refit]:
    """Fit all down projections of a layer.

    Args:
        start: the layer with the down projections to begin with.
        active: the activations of its neurons on the calibration tokens.
        targets: fp32 ``[t, d]`` for every batch, in order.
        everything: fit all tokens at the end, or only those that are not held out, so that they can go on judging.

    Returns:
        The new down projections, fp32 ``[d, N]``, and how well they fit.

    Raises:
        CheckpointError: the targets or activations are not finite.
    """
    d, width = start.down.shape
    sums = RidgeSums(width, d, torch.float32)
    for batch, target in zip(active.batches(), targets, strict=True):
        sums.add(batch.hidden, _without(start.bias, target), batch.weight, batch.held_out)
    if not sums.finite:
        raise _not_finite(active.layer)
    before = sums.subtract(start.down.T.double())
    choice = sums.best(REFIT_STRENGTHS)
    solution = sums.solve(choice.strength, everything, condition=True)
    report = Refit(before, before * choice.held_out_loss, choice.strength, solution.condition)
    return start.down + solution.weights.T.float(), report


def fit_scale(routing: Routing, active: ExpertActivations, targets: Iterable[torch.Tensor]) -> tuple[float, Refit]:
    """Fit one factor on the routed experts' neurons of a layer by least squares.

    Returns:
        The factor, relative to the plain sum of the chosen experts, and how well it fits. One that is not positive (then the
        routed experts say nothing about the target) is replaced by 1.

    Raises:
        CheckpointError: the targets or activations are not finite.
    """
    norms = _Norms()
    product = square = held_product = held_square = 0.0
    for batch, whole in zip(active.batches(), targets, strict=True):
        target = _without(routing.bias, whole)
        shared, routed = routing.parts(batch.hidden)
        error = target - shared - routed
        norms.add(target, error, batch)
        weight = batch.weight.double()
        along = weight @ ((target - shared).double() * routed.double()).sum(1)
        length = weight @ routed.double().square().sum(1)
        if batch.held_out:
            held_product, held_square = held_product + along.item(), held_square + length.item()
        product, square = product + along.item(), square + length.item()
    norms.check(active.layer)
    factor = product / square if square > 0 and product > 0 else 1.0
    if norms.held_target == 0:
        held_product, held_square = product, square
    # ||r - (f - 1) u||^2 = ||r||^2 - 2 (f - 1) <r, u> + (f - 1)^2 ||u||^2 with r = target - shared - u.
    change = factor - 1
    gain = (2 * change * (held_product - held_square) - change**2 * held_square) / norms.target
    return factor, Refit(norms.relative, norms.relative - gain, factor=factor)


def _without(bias: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    """Return what is left of a target for the neurons to give."""
    return target if bias is None else target - bias


class _Norms:
    """Squared lengths of targets and errors, over held-out tokens where there are any."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, 2, dtype=torch.float64)  # all or held out, target or error

    def add(self, target: torch.Tensor, error: torch.Tensor, batch: TokenActivations) -> None:
        """Add one batch."""
        weight = batch.weight.double()
        squares = [(weight @ values.double().square().sum(1)).item() for values in (target, error)]
        for row in (0, 1) if batch.held_out else (0,):
            self._sums[row] += torch.tensor(squares, dtype=torch.float64)

    @property
    def held_target(self) -> float:
        """Squared length of the held-out targets alone."""
        return self._sums[1, 0].item()

    @property
    def target(self) -> float:
        """Squared length of the targets that errors are measured on."""
        return self._sums[1 if self.held_target > 0 else 0, 0].item()

    @property
    def relative(self) -> float:
        """Squared error relative to the targets."""
        row = self._sums[1 if self.held_target > 0 else 0]
        return (row[1] / row[0]).item() if row[0] > 0 else 0.0

    def check(self, layer: int) -> None:
        """Refuse sums that are not finite.

        Raises:
            CheckpointError: names the layer.
        """
        if not bool(self._sums.isfinite().all()):
            raise _not_finite(layer)


def _not_finite(layer: int) -> CheckpointError:
    return CheckpointError(
        f"layer {layer}: the calibration states are not finite",
        hint="convert the checkpoint in the dtype it was trained in, or use --calibration-mode parallel",
    )
