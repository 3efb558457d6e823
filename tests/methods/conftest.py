"""A small fp64 layer, methods run on it as a conversion does, and the formulas again in plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from upcycle.calibration.decide_layer import generator
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape, Part
from upcycle.methods.base import Method
from upcycle.registry import load
from upcycle.routers.random_rows import RandomParameters, RandomRouter

D, F, TOKENS = 8, 24, 5
Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]


def ffn_loops(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """``y = Wd (silu(Wg x) * (Wu x))`` of one token, neuron by neuron."""
    y = np.zeros(down.shape[0])
    for j in range(gate.shape[0]):
        z = sum(gate[j, i] * x[i] for i in range(len(x)))
        u = sum(up[j, i] * x[i] for i in range(len(x)))
        y += down[:, j] * (z / (1 + np.exp(-z)) * u)
    return y


@dataclass(frozen=True)
class Layer:
    """One converted layer: what the method decided, and every tensor that was built of it, in fp64 numpy."""

    method: Method
    shape: MoeShape
    blueprint: LayerBlueprint
    ffn: FeedForward

    def expert(self, e: int) -> Matrices:
        """Gate, up, down of a routed expert, scaled as it is stored."""
        tensors = ExpertTensors(self.ffn, self.blueprint)
        gate, up, down = (tensors.part(Part(kind, e)).numpy() for kind in ("gate", "up", "down"))  # type: ignore[arg-type]
        return gate, up, down

    @property
    def shared(self) -> Matrices:
        """The wide shared expert."""
        tensors = ExpertTensors(self.ffn, self.blueprint)
        gate, up, down = (
            tensors.part(Part(kind)).numpy()  # type: ignore[arg-type]
            for kind in ("shared_gate", "shared_up", "shared_down")
        )
        return gate, up, down

    @property
    def dense(self) -> Matrices:
        """The dense FFN's."""
        return self.ffn.gate.numpy(), self.ffn.up.numpy(), self.ffn.down.numpy()

    @property
    def rows(self) -> np.ndarray:
        """The router's, fp64."""
        assert self.blueprint.router is not None
        return self.blueprint.router.double().numpy()

    def weights(self, x: np.ndarray) -> dict[int, float]:
        """The chosen experts of one token and what they weigh."""
        logits = [sum(row[i] * x[i] for i in range(len(x))) for row in self.rows]
        exponentials = [np.exp(logit - max(logits)) for logit in logits]
        p = [value / sum(exponentials) for value in exponentials]
        chosen = sorted(range(len(p)), key=lambda e: -p[e])[: self.shape.top_k]
        total = sum(p[e] for e in chosen) if self.shape.normalized else 1.0
        return {e: p[e] / total for e in chosen}

    def output(self, x: np.ndarray, experts: Sequence[Matrices] | None = None) -> np.ndarray:
        """Shared experts at weight 1, and the chosen ones: those that were built, or others in their place."""
        y = ffn_loops(x, *self.shared) if self.shape.shared else np.zeros(D)
        for e, weight in self.weights(x).items():
            y = y + weight * ffn_loops(x, *(experts[e] if experts else self.expert(e)))
        return y

    def error(self, x: np.ndarray) -> float:
        """``||layer - dense|| / ||dense||`` over all tokens."""
        dense = np.stack([ffn_loops(token, *self.dense) for token in x])
        return float(np.linalg.norm(np.stack([self.output(token) for token in x]) - dense) / np.linalg.norm(dense))


@pytest.fixture
def x() -> np.ndarray:
    """``[tokens, d]``."""
    return np.random.default_rng(3).standard_normal((TOKENS, D))


@pytest.fixture
def make() -> Callable[..., Layer]:
    """``make("virtual_groups", top_k=4, expansion=2)``: a layer by a method, its parameters by name; the rest is the recipe's."""

    def build(
        name: str,
        experts: int | None = None,
        top_k: int | None = None,
        shared: int = 0,
        scale: float | None = None,
        pad: bool = False,
        width: int = F,
        seed: int = 0,
        **parameters: Any,
    ) -> Layer:
        cls = load("method", name)
        method: Method = cls(cls.Parameters(**parameters))
        sizes = method.sizes(experts, top_k)
        e, k = (8 if sizes[0] is None else sizes[0]), (2 if sizes[1] is None else sizes[1])
        shape = MoeShape(e, k, shared, method.expert_size(width, e, shared, pad), (3,), method.normalized)
        method.check(shape)
        factor = method.scale(method.default_scale, e, k) if scale is None else scale
        rng = torch.Generator().manual_seed(11)
        matrices = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((width, D), (width, D), (D, width)))
        ffn = FeedForward(3, *matrices, norm=torch.ones(D, dtype=torch.float64), activation="silu")
        found = method.blueprint(ffn, shape, factor, generator(seed, 3, "method"))
        if found.draws is not None and found.draws.rule == "initializer" and found.draws.std is None:
            found = replace(found, draws=replace(found.draws, std=0.02))
        rows = RandomRouter(RandomParameters(std=0.5)).rows(found, ffn, generator(seed, 3, "router"))
        return Layer(method, shape, replace(found, router=method.tie(rows)), ffn)

    return build
