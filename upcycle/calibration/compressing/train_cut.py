"""Trains what is left of a compressed layer, alone in memory, towards the layer that it had: experts and router together, or an FFN.

It follows the closed-form refit of down projections (``refit_cut.py``, ``refit_dense.py``), and has the same target. What that cannot
move learns by Adam: gate and up, and the router's rows, through the weights of the experts that they choose (distillation of a router
after a cut; the choice itself has no gradient, and follows the rows). The stock class's own block computes, with its rule of
routing. As in :mod:`upcycle.ffn.reconstruction`, held-out windows judge: a layer that is not better for them keeps what it had.

T tokens, E' experts that are left, F neurons each, d the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed
from upcycle.ffn.reconstruction import BlockSchedule
from upcycle.trainers.routing.stock_routers import RouterPlace

_BETAS = (0.9, 0.99)
_WARM_UP = 20  # steps


def trained_parts(place: RouterPlace) -> dict[str, torch.nn.Parameter]:
    """Return what is trained of a layer: ``gate_up`` ``[E', 2 F, d]``, ``down`` ``[E', d, F]``, ``router`` ``[E', d]``."""
    experts: Any = place.experts
    rows = next(weight for weight in place.router.parameters() if weight.dim() == 2 and len(weight) == place.count)
    return {"gate_up": experts.gate_up_proj, "down": experts.down_proj, "router": rows}


class BlockTraining:
    """Trains one loaded layer of the compressed model.

    Args:
        uncut: the walk of the uncut model, with the layer loaded.
        cut: that of the compressed one, likewise.
        index: the layer.
        block: the compressed layer's experts with their router, or its FFN.
        parts: its weights that train, by what they are: of experts those of :func:`trained_parts`.
        schedule: how long and how fast.
        rng: the order of the tokens.
    """

    def __init__(
        self,
        uncut: MoeWalk,
        cut: MoeWalk,
        index: int,
        block: Any,
        parts: dict[str, torch.nn.Parameter],
        schedule: BlockSchedule,
        rng: torch.Generator,
    ) -> None:
        self._uncut, self._cut, self._index = uncut, cut, index
        self._schedule, self._rng = schedule, rng
        self._block, self.parts = block, parts
        for part in self.parts.values():
            part.data = part.data.clone()  # it may be a tensor of the uncut model's

    def fit(
        self, theirs: torch.Tensor, ours: torch.Tensor, round_: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> dict[str, float]:
        """Train the layer; where that does not help, it stays as it was.

        Args:
            theirs: the uncut model's stream before the layer, ``[N, W, d]``.
            ours: that of the compressed model.
            round_: rounds a part to what will be stored.

        Returns:
            What is missing before and after, squared, on held-out tokens, which judge, and the steps.
        """
        x, target = self._inputs(theirs, ours)
        held = held_out_tokens(theirs)
        judged = held if bool(held.any()) else torch.ones_like(held)
        before = self._missing(x[judged], target[judged])
        kept = {name: part.detach().clone() for name, part in self.parts.items()}
        steps = self._train(x[~held], target[~held])
        for name, part in self.parts.items():
            part.data = round_(name, part.detach()).float()
        after = self._missing(x[judged], target[judged])
        if not after < before:
            for name, part in self.parts.items():
                part.data = kept[name]
        return {
            "before": before,
            "after": min(before, after) if math.isfinite(after) else before,
            "steps": float(steps),
        }

    def _inputs(self, theirs: torch.Tensor, ours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block's inputs, and what it should give for them, both fp32 ``[T, d]``."""
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        missing = []

        def see(_: Any, given: tuple[torch.Tensor, ...], made: Any) -> None:
            inputs.append(given[0])
            outputs.append(_one(made).detach())

        handle = self._block.register_forward_hook(see)
        try:
            for batch in self._uncut.batches(len(theirs)):
                whole: list[Routed] = []
                wanted = self._uncut.run(self._index, theirs[batch], whole.append)
                made = self._cut.run(self._index, ours[batch])
                error = (wanted - made) / self._uncut.multiplier
                if self._uncut.norm_behind(self._index) is not None:
                    error = whole[0].block - outputs[-1].reshape(whole[0].block.shape)
                missing.append(error.reshape(-1, error.shape[-1]))
        finally:
            handle.remove()
        x, output = (torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (inputs, outputs))
        return x, output + torch.cat(missing)

    def _missing(self, x: torch.Tensor, target: torch.Tensor) -> float:
        with torch.no_grad():
            pairs = zip(x.split(4096), target.split(4096), strict=True)
            return float(sum((self._output(a) - b).double().square().sum().item() for a, b in pairs))

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        made = _one(self._block(x[None]))
        return made.reshape(x.shape)

    def _train(self, x: torch.Tensor, target: torch.Tensor) -> int:
        """Train in place; returns the steps taken, fewer where the loss is not finite."""
        schedule, parts = self._schedule, [*self.parts.values()]
        groups = [
            {"params": [part.requires_grad_()], "lr": schedule.rate * part.detach().square().mean().sqrt().item()}
            for part in parts
        ]
        optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=1e-12)
        highest = [group["lr"] for group in optimizer.param_groups]
        pieces, done = max(1, len(x) // schedule.batch), 0
        total = schedule.passes * pieces
        square = target.square().sum().item() / pieces or 1.0
        try:
            for _ in range(schedule.passes):
                for some in torch.randperm(len(x), generator=self._rng).tensor_split(pieces):
                    factor = min(1.0, (done + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * done / total))
                    for group, rate in zip(optimizer.param_groups, highest, strict=True):
                        group["lr"] = rate * factor
                    with torch.enable_grad():
                        loss = (self._output(x[some]) - target[some]).square().sum() / square
                        optimizer.zero_grad()
                        loss.backward()
                    if not math.isfinite(loss.item()):
                        return done
                    optimizer.step()
                    done += 1
        finally:
            for part in parts:
                part.requires_grad_(False)
                part.grad = None
        return done


def _one(made: Any) -> torch.Tensor:
    found: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return found
