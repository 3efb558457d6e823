"""Estimates how much ranks send each other in an optimizer step.

N ranks, e of which share experts, b bytes per weight, A passes per step, T tokens of a pass, D hidden, K top-k, P elements that a
rank computes with and that train. In a ring of n ranks, each sends ``(n - 1) / n`` of a tensor to gather or to scatter it, and
twice that to sum it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from upcycle.trainers.forecast.model_counts import ModelCounts, Weight
from upcycle.trainers.forecast.ranks_planned import World
from upcycle.trainers.forecast.zero_division import Division

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind in a step.

    ``payload`` is how many bytes each rank hands to them, ``ranks`` the size of the group that takes part, and ``stride`` the
    distance between its members' numbers.
    """

    kind: CollectiveKind
    payload: float
    ranks: int
    stride: int = 1

    @property
    def sent(self) -> float:
        """Bytes that leave one rank."""
        return self.payload * (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks

    def seconds(self, world: World) -> float:
        """A lower bound on the time: the longer of that within machines and that between them, as if both overlapped.

        With n members on m machines, each machine has n / m of them. To gather, scatter or sum a tensor, they share the
        ``(m - 1) / m`` of it that goes to other machines among their network adapters. In an all-to-all, each rank sends
        ``1 / n`` to every other.
        """
        machines, together = world.spread(self.ranks, self.stride)
        if self.kind == "all_to_all":
            inside = self.payload * (together - 1) / self.ranks
            outside = self.payload * (self.ranks - together) / self.ranks
        else:
            twice = 2 if self.kind == "all_reduce" else 1
            inside = twice * self.payload * (together - 1) / together
            outside = twice * self.payload * (machines - 1) / machines / together
        return max(inside / world.device.link, outside / world.device.network)


@dataclass(frozen=True)
class CommunicationForecast:
    """All collectives of one optimizer step."""

    traffic: tuple[Traffic, ...]

    def sent(self, kind: CollectiveKind) -> float:
        """Bytes that leave one rank in collectives of one kind."""
        return sum(each.sent for each in self.traffic if each.kind == kind)

    @property
    def total(self) -> float:
        """Bytes that leave one rank in all collectives."""
        return sum(each.sent for each in self.traffic)

    def seconds(self, world: World) -> float:
        """A lower bound on the time of all collectives, one after another."""
        return sum(each.seconds(world) for each in self.traffic)

    def as_dict(self) -> dict[str, Any]:
        """Bytes that leave one rank, by kind of collective and in total."""
        kinds: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        return {**{kind: self.sent(kind) for kind in kinds}, "total": self.total}


def forecast_communication(division: Division, parent: ModelCounts | None = None) -> CommunicationForecast:
    """What DeepSpeed sends: gradients, weights, and tokens to experts. Norms, counts and auxiliary losses are not counted.

    - Stage 0: gradients are summed once, ``b P``.
    - Stage 1: the same, and every rank's new weights are gathered, ``b P``.
    - Stage 2: gradients are summed in every pass, ``A b P``, because a rank keeps only those that it owns; new weights are
      gathered, ``b P``. DeepSpeed sums whole buckets on all ranks, where a reduction to their owners would be enough
      (``use_multi_rank_bucket_allreduce``).
    - Stage 3: weights are gathered in every pass, once forward and once more backward, unless ``max_reuse_distance`` keeps them;
      three times if passes survey (:mod:`upcycle.trainers.losses.survey`), as DeepSpeed then keeps none; small weights once a
      step. Gradients are scattered in every pass, ``A b P``.
    - Divided experts: the same among the ``N / e`` ranks that hold the same experts, and four all-to-alls of ``b K T D`` per layer
      and pass (to experts and back, forward and backward), two more where layers are recomputed, and two more for a survey.
    - A dense ``parent`` in stage 3: its weights are gathered whenever it runs, once or twice a pass.
    """
    found: list[Traffic] = []
    for divided in (False, True):
        weights = [weight for weight in division.counts.weights if weight.divided == divided]
        if weights:
            stride = division.expert_parallel if divided else 1
            found += _states(division, weights, division.holders(weights[0]), stride)
    if division.expert_parallel > 1:
        rounds = 4 + 2 * (division.recipe.activation_checkpointing + division.survey.student)
        rows = sum(layer.top_k for layer in division.counts.moe_layers) * division.tokens
        payload = division.passes * rounds * division.item * rows * division.counts.hidden
        found.append(Traffic("all_to_all", payload, division.expert_parallel))
    if parent and division.divides_frozen:
        times = division.passes * (1 + division.survey.parent)
        found.append(Traffic("all_gather", times * division.parent_item * parent.elements, division.world_size))
    return CommunicationForecast(tuple(each for each in found if each.ranks > 1 and each.payload))


def _states(division: Division, weights: list[Weight], ranks: int, stride: int) -> Iterable[Traffic]:
    trained = division.local([weight for weight in weights if weight.trained])
    item, passes = division.item, division.passes
    if division.zero_stage < 3:
        yield Traffic("all_reduce", (passes if division.zero_stage == 2 else 1) * item * trained, ranks, stride)
    if division.zero_stage in (1, 2):
        yield Traffic("all_gather", item * trained, ranks, stride)
    if division.zero_stage == 3:
        small = division.local([weight for weight in weights if weight.trained and division.persistent(weight)])
        yield Traffic("all_gather", item * (small + passes * _gathered(division, weights)), ranks, stride)
        yield Traffic("reduce_scatter", passes * item * trained, ranks, stride)


def _gathered(division: Division, weights: list[Weight]) -> float:
    """Elements that ZeRO-3 gathers in one pass: every weight before its layer, and again in the backward pass if more than
    ``max_reuse_distance`` elements are used in between, which is twice those of the layers after it.
    """
    behind, total = 0.0, 0.0
    wanted = {weight.name for weight in weights}
    reach = division.setting("max_reuse_distance")
    survey = division.survey.student
    again = 2 + division.recipe.activation_checkpointing + survey
    stays = not survey  # after a forward pass without backward, DeepSpeed no longer knows what is used next
    for weight in reversed(division.counts.weights):
        elements = division.local([weight])
        if not division.persistent(weight) and weight.name in wanted:
            total += elements * (1 if stays and 2 * behind < reach else again)
        behind += elements
    return total
