"""Block reconstruction: trains the tensors of one layer, alone in memory, towards the dense model's output.

Reconstructing a network block by block is how post-training quantisation repairs what rounding costs (BRECQ, arXiv 2102.05426).
Here it follows the closed-form refit of a split: gate, up and down of all experts learn by Adam what the refit, which moves the
down projections alone, cannot express. The router stays as it was fitted: each token trains the experts that it will run. No
gradient leaves the layer, so one layer's weights, gradients and moments are all that is held.

One batch in eight is trained on by nobody and judges the result: a layer that it does not find better keeps its closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import linear

from upcycle.ffn.activations import Inputs
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.neurons import activation_function

Pass = Callable[
    [], Iterable[tuple[Inputs, torch.Tensor]]
]  # starts a pass over batches: inputs, and fp32 targets [t, d]
_BETAS = (0.9, 0.99)  # a few hundred steps: the second moment must forget within tens of them
_WARM_UP = 20  # steps
_RISE = 1.1  # a pass whose mean loss is so much above the first one's has diverged; less is the order of the tokens


@dataclass(frozen=True)
class BlockSchedule:
    """How long and how fast a layer is trained.

    Attributes:
        passes: how often all calibration tokens are read.
        batch: tokens per step.
        rate: learning rate at its highest, as a fraction of the root mean square of each matrix; it falls as a cosine to zero.
    """

    passes: int
    batch: int
    rate: float


@dataclass(frozen=True)
class BlockFit:
    """What the training of a layer did.

    ``trained_error`` is that of what stands, as a :class:`~upcycle.ffn.refit.Refit` measures it.
    ``reason`` says why the closed form stands, where training did not help.
    """

    steps: int
    trained_error: float
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what a refit's report lacks, under the names that the layer's report has."""
        found: dict[str, Any] = {"steps": self.steps, "error_trained": self.trained_error}
        return found if self.reason is None else {**found, "not_trained": self.reason}


class LayerFunction:
    """A converted layer as it computes, from its own tensors: shared experts, and those that the router chooses, summed.

    Args:
        ffn: the dense layer; its activation and biases.
        blueprint: which neurons the experts hold, the router, and fitted tensors where there are any.

    Attributes:
        gate: fp32 ``[N, d]``, one row for each of the blueprint's neurons, shared experts first; ``None`` without a gate.
        up: fp32 ``[N, d]``.
        down_rows: fp32 ``[N, d]``, the transpose of the down projection.
        bias: fp32 ``[d]``, the down bias, or ``None``.
    """

    def __init__(self, ffn: FeedForward, blueprint: LayerBlueprint) -> None:
        neurons = blueprint.neurons.clamp(min=0)
        self._zero = blueprint.neurons == ZERO_NEURON

        def taken(name: str) -> torch.Tensor | None:
            fitted = blueprint.fitted(name)
            dense = ffn.tensor(name)
            if dense is None:
                return None
            if fitted is not None:
                found = fitted.float().T if name == "down" else fitted.float()
            else:
                found = dense.float()[:, neurons].T if name == "down" else dense.float()[neurons]
            return found.contiguous().clone()

        self._act = activation_function(ffn.activation)
        up, down = taken("up"), taken("down")
        assert up is not None
        assert down is not None
        self.gate, self.up, self.down_rows = taken("gate"), up, down
        biases = (ffn.gate_bias, ffn.up_bias)
        self._biases = [None if b is None else b.float()[neurons].masked_fill(self._zero, 0.0) for b in biases]
        for tensor in (self.gate, self.up, self.down_rows):
            if tensor is not None:
                tensor[self._zero] = 0.0
        self.bias = None if ffn.down_bias is None else ffn.down_bias.float()
        assert blueprint.router is not None or not blueprint.routed
        self._router = None if blueprint.router is None else blueprint.router.to(ffn.dtype).float()
        size = blueprint.intermediate_size
        self._always, self._size = len(blueprint.shared) * size, size
        self._experts, self._top_k = len(blueprint.routed), blueprint.top_k

    @property
    def weights(self) -> list[torch.Tensor]:
        """The tensors that are trained."""
        return [tensor for tensor in (self.gate, self.up, self.down_rows) if tensor is not None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output ``[t, d]`` for ``x`` ``[t, d]``, without the down bias."""
        out = self._some(x, slice(0, self._always)) if self._always else torch.zeros_like(x)
        if not self._experts:
            return out
        if self._top_k == self._experts or self._router is None:
            return out + self._some(x, slice(self._always, None))
        chosen = linear(x, self._router).topk(self._top_k, dim=1).indices.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self._experts).tolist()
        made = []
        for expert, rows in enumerate(x.index_select(0, order // self._top_k).split(counts)):
            first = self._always + expert * self._size
            made.append(self._some(rows, slice(first, first + self._size)))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return out + torch.cat(made).index_select(0, back).view(len(x), self._top_k, -1).sum(1)

    def _some(self, x: torch.Tensor, some: slice) -> torch.Tensor:
        """Return what some neurons add."""
        gate_bias, up_bias = (None if bias is None else bias[some] for bias in self._biases)
        raised = linear(x, self.up[some], up_bias)
        if self.gate is None:
            return self._act(raised) @ self.down_rows[some]
        return self._act(linear(x, self.gate[some], gate_bias)) * raised @ self.down_rows[some]

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output ``[t, d]``, with the down bias; no gradient is kept."""
        with torch.no_grad():
            made: torch.Tensor = self(x)
        return made if self.bias is None else made + self.bias

    def error(self, batches: Iterable[tuple[Inputs, torch.Tensor]]) -> float:
        """Return ``||target - output||^2 / ||target||^2`` over held-out tokens, or over all where none is held out."""
        sums = torch.zeros(2, 2, dtype=torch.float64)  # trained on or held out; error and target
        with torch.no_grad():
            for given, target in batches:
                weight = given.weight.double()
                wanted = target if self.bias is None else target - self.bias
                parts = (self(given.x) - wanted, wanted)
                found = torch.stack([weight @ part.double().square().sum(1) for part in parts])
                sums[int(given.held_out)] += found
        error, square = (sums[1] if sums[1, 1] > 0 else sums.sum(0)).tolist()
        return error / square if square else 0.0

    def stored(self, blueprint: LayerBlueprint, dtype: torch.dtype) -> LayerBlueprint:
        """Return the blueprint with this layer's tensors, in the dtype that is stored."""
        gate = None if self.gate is None else self.gate.detach().to(dtype)
        up, down = self.up.detach().to(dtype), self.down_rows.detach().T.to(dtype).contiguous()
        return replace(blueprint, gate=gate, up=up, down=down)


def reconstruct(
    blueprint: LayerBlueprint, ffn: FeedForward, batches: Pass, schedule: BlockSchedule, rng: torch.Generator
) -> tuple[LayerBlueprint, BlockFit]:
    """Train a layer's gate, up and down towards its targets.

    Args:
        blueprint: the layer after its closed-form refit, with a router.
        ffn: the dense layer, whose dtype the result is stored in.
        batches: starts a pass over the calibration tokens and their targets.
        schedule: how long and how fast.
        rng: the order of the tokens within a batch.

    Returns:
        The blueprint with the trained tensors, or as it was where they are not better, and what happened.
    """
    layer = LayerFunction(ffn, blueprint)
    before = layer.error(batches())
    steps, reason = _train(layer, batches, schedule, rng)
    trained = layer.stored(blueprint, ffn.dtype)
    after = before
    if reason is None:
        after = LayerFunction(ffn, trained).error(batches())
        if not math.isfinite(after):
            after, reason = before, f"the trained weights are not finite in {ffn.dtype}"
        elif after >= before:
            reason = f"held-out error {after:.4f} after training, {before:.4f} in closed form"
    fit = BlockFit(steps, after if reason is None else before, reason)
    return (trained, fit) if reason is None else (blueprint, fit)


def _train(
    layer: LayerFunction, batches: Pass, schedule: BlockSchedule, rng: torch.Generator
) -> tuple[int, str | None]:
    """Train ``layer`` in place; returns the steps taken, and why it was stopped early, if it was."""
    sizes = [len(given.x) for given, _ in batches() if not given.held_out]
    total = schedule.passes * sum(_pieces(size, schedule.batch) for size in sizes)
    optimizer = torch.optim.Adam(_groups(layer, schedule.rate), betas=_BETAS, eps=1e-12, fused=True)
    highest = [group["lr"] for group in optimizer.param_groups]
    done, first = 0, 0.0
    for number in range(schedule.passes):
        loss_sum = square_sum = 0.0
        for given, target in batches():
            if given.held_out:
                continue
            order = torch.randperm(len(given.x), generator=rng)
            for some in order.tensor_split(_pieces(len(order), schedule.batch)):
                factor = min(1.0, (done + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done / total))
                for group, rate in zip(optimizer.param_groups, highest, strict=True):
                    group["lr"] = rate * factor
                wanted = target[some] if layer.bias is None else target[some] - layer.bias
                loss, square = _step(layer, optimizer, given.x[some], wanted, given.weight[some])
                if not math.isfinite(loss):
                    return done, f"the loss was not finite at step {done + 1} of {total}"
                loss_sum, square_sum, done = loss_sum + loss, square_sum + square, done + 1
        relative = loss_sum / square_sum if square_sum else 0.0
        first = first if number else relative
        if relative > _RISE * first:
            return done, f"the loss rose from {first:.4f} to {relative:.4f} in pass {number + 1}"
    return done, None


def _step(
    layer: LayerFunction, optimizer: torch.optim.Optimizer, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> tuple[float, float]:
    """Take one step; returns the squared error before it, and the targets' square."""
    square = (weight @ target.square().sum(1)).item()
    with torch.enable_grad():
        loss = weight @ (layer(x) - target).square().sum(1)
        optimizer.zero_grad()
        (loss / max(square, torch.finfo(torch.float32).tiny)).backward()
    if math.isfinite(loss.item()):
        optimizer.step()
    return loss.item(), square


def _groups(layer: LayerFunction, rate: float) -> list[dict[str, Any]]:
    """One group for each tensor, so that all move by the same fraction of their size."""
    return [
        {"params": [weight.requires_grad_()], "lr": rate * weight.detach().square().mean().sqrt().item()}
        for weight in layer.weights
    ]


def _pieces(tokens: int, batch: int) -> int:
    return max(1, tokens // batch)
