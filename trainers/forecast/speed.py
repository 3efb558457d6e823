"""Upper bounds on the tokens per second of a run, from what its devices compute, its memory moves and its network sends.

T tokens of a pass, D hidden, I width of an expert, E experts, K top-k, R = T K rows, b bytes per element, N ranks, A passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upcycle.trainers.forecast.communication import CommunicationForecast
from upcycle.trainers.forecast.memory import expert_bytes, layer_bytes, optimizer_bytes
from upcycle.trainers.forecast.model_counts import LayerCounts, ModelCounts
from upcycle.trainers.forecast.ranks_planned import World
from upcycle.trainers.forecast.zero_division import Division

# How often a layer of experts reads or writes R D, T D and R I elements: ((forward), (backward)), by implementation.
_MOVED = {
    "eager": ((9, 0, 8), (12, 0, 15)),
    "grouped_mm": ((13, 0, 8), (13, 0, 15)),
    "upcycle": ((3, 1, 4), (5, 1, 12)),
}


@dataclass(frozen=True)
class SpeedForecast:
    """Upper bounds in tokens per second of all ranks together, each as if the others took no time.

    ``network`` is ``None`` where nothing is sent.
    """

    compute: float
    memory: float
    network: float | None

    @property
    def bound(self) -> float:
        """The lowest bound: it holds even if computing, moving and sending overlap perfectly."""
        return min(self.compute, self.memory, *([self.network] if self.network else []))

    @property
    def unoverlapped(self) -> float:
        """The bound if nothing is sent while something is computed, as DeepSpeed's stages 0 to 2 do by default."""
        working = 1 / min(self.compute, self.memory)
        return 1 / (working + (1 / self.network if self.network else 0.0))

    @property
    def limit(self) -> str:
        """The name of the lowest bound."""
        return next(name for name in ("compute", "memory", "network") if getattr(self, name) == self.bound)

    def as_dict(self) -> dict[str, Any]:
        """All bounds as plain data."""
        return {**vars(self), "bound": self.bound, "unoverlapped": self.unoverlapped, "limit": self.limit}


def forecast_speed(
    division: Division, world: World, communication: CommunicationForecast, parent: ModelCounts | None
) -> SpeedForecast:
    """The bounds on a run's speed.

    Args:
        division: how the run is divided.
        world: its ranks and devices.
        communication: what they send in a step.
        parent: the dense model to distil from, if any, which runs forward, too.
    """
    step = division.recipe.tokens_per_step
    network = communication.seconds(world)
    return SpeedForecast(
        compute=world.size * world.device.flops / flops_per_token(division, parent),
        memory=step / (moved_bytes(division) / world.device.bandwidth),
        network=step / network if network else None,
    )


def flops_per_token(division: Division, parent: ModelCounts | None) -> float:
    """Operations per token that are really computed.

    To those of :mod:`upcycle.trainers.forecast.flops` come another forward pass where layers are recomputed, the parent's forward
    pass, and both models' once more where losses need a survey (:mod:`upcycle.trainers.losses.survey`).
    """
    student, survey = division.counts.flops, division.survey
    again = student.forward * (division.recipe.activation_checkpointing + survey.student)
    return student.total + again + (parent.flops.forward * (1 + survey.parent) if parent else 0.0)


def moved_bytes(division: Division) -> float:
    """Bytes that a rank's memory moves in a step, at least.

    In every pass, each weight of the rank is read forward and backward, and its gradient is written (all experts are used if R is
    well above E). Layers of experts move what their implementation does (:data:`_MOVED`). All else that is kept for the backward
    pass is written once and read once. A survey reads the weights once more. The optimizer reads gradients, reads and writes its
    states and master weights, and writes weights.
    """
    item, counts = division.item, division.counts
    local = division.local(counts.weights)
    per_pass = (2.0 + division.survey.student) * item * local + item * division.local(division.trained)
    for layer in counts.layers:
        rest = layer_bytes(division, layer)
        if layer.experts:
            rest += experts_moved(division, layer) / 2 - expert_bytes(division, layer)
        per_pass += 2 * rest
    per_pass += 2 * 8 * division.tokens * counts.vocabulary
    states = 2 * optimizer_bytes(division)
    share = division.partition(division.trained) if division.zero_stage else division.local(division.trained)
    return division.passes * per_pass + states + (4 + item) * share


def experts_moved(division: Division, layer: LayerCounts) -> float:
    """Bytes of activations that one layer of routed experts reads and writes in a pass, forward and backward."""
    rows = division.tokens * layer.top_k
    sizes = (rows * division.counts.hidden, division.tokens * division.counts.hidden, rows * layer.width)
    ways = _MOVED.get(division.counts.implementation, _MOVED["grouped_mm"])
    return float(division.item * sum(times * size for way in ways for times, size in zip(way, sizes, strict=True)))
