"""What routers with a hidden layer share: the tokens that they learn from, and how they are trained. T tokens, E experts, H, d."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field

from upcycle.ffn.activations import Activations, TokenActivations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.router_capture import ExpertMap
from upcycle.ffn.router_network import RouterForm, RouterNetwork
from upcycle.plugins import PluginParameters
from upcycle.routers.calibrated.base import LayerRouter


class TrainingParameters(PluginParameters):
    """Parameters of every :class:`HiddenLayerRouter`."""

    tokens: int = Field(32768, ge=1, description="trained on about this many tokens, if there are so many")
    epochs: int = Field(30, ge=1, description="passes of training over them")
    batch: int = Field(512, ge=1, description="tokens per step")
    learning_rate: float = Field(0.01, gt=0, description="Adam's highest learning rate")


@dataclass(frozen=True)
class Examples:
    """Inputs ``[T, d]``, what is to be said of every expert ``[T, E]``, and weights ``[T]`` of some tokens, fp32."""

    x: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor

    def batches(self, size: int, rng: torch.Generator) -> Iterator[Examples]:
        """Yield all tokens once, in random order."""
        for some in torch.randperm(len(self.x), generator=rng).split(size):
            yield Examples(self.x[some], self.y[some], self.weight[some])


class HiddenLayerRouter(LayerRouter):
    """A router of two matrices, trained by Adam on calibration tokens; one batch in eight is kept from training, to judge it.

    Losses are means over the experts and, weighted, over the tokens. All tokens of a step are one batch of matrix products.
    """

    Parameters = TrainingParameters
    parameters: TrainingParameters

    @abstractmethod
    def targets(self, batch: TokenActivations, experts: ExpertMap) -> torch.Tensor:
        """Return fp32 ``[t, E]``: what the router is to learn."""

    @abstractmethod
    def start(
        self, blueprint: LayerBlueprint, ffn: FeedForward, form: RouterForm, rng: torch.Generator
    ) -> RouterNetwork:
        """Return the router before training."""

    @abstractmethod
    def losses(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of every token and expert, ``[t, E]``."""

    @abstractmethod
    def merit(self, logits: torch.Tensor, examples: Examples) -> float:
        """Return how good a router is on the tokens kept from training; the best epoch is taken."""

    def network(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> RouterNetwork:
        """See :meth:`upcycle.routers.base.Router.network`."""
        if activations is None:
            raise self.needs_text()
        learnt, judged = self._examples(activations, ExpertMap(blueprint, ffn))
        begun = self.start(blueprint, ffn, self.form(len(blueprint.routed)), rng)
        # Adam's steps are as long in every unit: with inputs of about 1 and targets of about 1, one rate fits all layers.
        size = 1.0 if begun.form.unit_inputs else _root_mean_square(learnt.x)
        unit = self.unit(learnt)
        learnt, judged = (Examples(e.x / size, e.y / unit, e.weight) for e in (learnt, judged))
        best = self._trained(begun, learnt, judged, rng)
        assert best.hidden is not None
        return RouterNetwork(best.rows * unit, best.hidden / size, best.form)

    def unit(self, examples: Examples) -> float:
        """Return what targets are divided by, and the trained router's output is multiplied by."""
        return 1.0

    def _examples(self, activations: Activations, experts: ExpertMap) -> tuple[Examples, Examples]:
        """Return what is trained on, and what is judged on: the held-out tokens, or all, if none are."""
        parts: tuple[list[Examples], list[Examples]] = ([], [])
        for batch in activations.some(self.parameters.tokens):
            x, weight = batch.x.float().clone(), batch.weight.float()
            parts[batch.held_out].append(Examples(x, self.targets(batch, experts), weight))
        learnt, judged = (_joined(part) for part in parts)
        return (learnt or judged, judged or learnt)  # type: ignore[return-value]

    def _trained(self, begun: RouterNetwork, learnt: Examples, judged: Examples, rng: torch.Generator) -> RouterNetwork:
        asked = self.parameters
        with torch.enable_grad():
            rows, hidden = (w.clone().requires_grad_() for w in (begun.rows, begun.hidden) if w is not None)
            network = RouterNetwork(rows, hidden, begun.form)
            optimizer = torch.optim.Adam([rows, hidden], lr=asked.learning_rate)
            steps = asked.epochs * math.ceil(len(learnt.x) / asked.batch)
            falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
            best, kept = -math.inf, begun
            for epoch in range(asked.epochs + 1):
                with torch.no_grad():
                    merit = self.merit(network.logits(judged.x), judged)
                if merit > best or not epoch:
                    best = merit
                    kept = RouterNetwork(rows.detach().clone(), hidden.detach().clone(), begun.form)
                if epoch == asked.epochs:
                    break
                for batch in learnt.batches(asked.batch, rng):
                    weight = batch.weight / batch.weight.sum()
                    loss = (self.losses(network.logits(batch.x), batch.y).mean(1) * weight).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    falling.step()
        return kept


def _rate(done: float) -> float:
    """Return the learning rate as a fraction of the highest, when a fraction of all steps is done: half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _root_mean_square(x: torch.Tensor) -> float:
    return max(x.double().square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)


def _joined(parts: list[Examples]) -> Examples | None:
    if not parts:
        return None
    return Examples(*(torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "weight")))


def initial(rows: int, columns: int, rng: torch.Generator) -> torch.Tensor:
    """Return fp32 ``[rows, columns]`` as a new ``torch.nn.Linear`` begins: uniform up to ``1 / sqrt(columns)``."""
    bound = columns**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=rng)
