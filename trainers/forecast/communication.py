"""Estimates what ranks send each other in a step.

N ranks, e of which share experts, b bytes per weight, A passes per step, P elements that a rank computes with and that train.
Rings move ``(n - 1) / n`` of a tensor per rank to gather or to scatter it, and twice that to add it up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from upcycle.trainers.forecast.model_counts import Weight
from upcycle.trainers.forecast.ranks_planned import World
from upcycle.trainers.forecast.zero_division import Division

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over a step: bytes that are handed to it on one rank, among how many ranks, so far apart."""

    kind: Kind
    payload: float
    ranks: int
    stride: int = 1

    @property
    def sent(self) -> float:
        """Bytes that leave one rank."""
        return self.payload * (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks

    def seconds(self, world: World) -> float:
        """At least so long: the larger of the time within machines and the time between them, as if both overlapped.

        Sums and gatherings go through every machine once: of ``n`` members on ``m`` machines, ``n / m`` of a machine's
        share the work of ``(m - 1) / m`` of the tensor on their own network adapters. In an exchange each rank sends
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
    """Everything that is sent in one optimizer step."""

    traffic: tuple[Traffic, ...]

    def sent(self, kind: Kind) -> float:
        """Bytes of one kind that leave one rank."""
        return sum(each.sent for each in self.traffic if each.kind == kind)

    @property
    def total(self) -> float:
        """Bytes that leave one rank."""
        return sum(each.sent for each in self.traffic)

    def seconds(self, world: World) -> float:
        """At least so long, one after another."""
        return sum(each.seconds(world) for each in self.traffic)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        kinds: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        return {**{kind: self.sent(kind) for kind in kinds}, "total": self.total}


def forecast_communication(division: Division) -> CommunicationForecast:
    """What DeepSpeed sends: gradients, weights, and tokens to experts. Norms, counts and auxiliary losses are left out.

    - stage 0: gradients are added up once, ``b P``;
    - stage 1: the same, and every rank's new weights are gathered, ``b P``;
    - stage 2: gradients are added up in every pass, as nobody keeps what others own: ``A b P``, and ``b P`` gathered. DeepSpeed
      adds up whole buckets where a reduction to their owners would do (``use_multi_rank_bucket_allreduce``);
    - stage 3: weights are gathered for every pass, and once more for its backward part unless ``max_reuse_distance`` lets them
      stay; small ones once a step; and three times where passes survey (``upcycle.trainers.losses.survey``), as DeepSpeed then
      keeps none. Gradients are scattered in every pass, ``A b P``;
    - divided experts: the same among the ``N / e`` ranks that hold the same ones, and four exchanges per layer and pass of
      ``b K T D`` (to experts and back, forward and backward), two more where layers are computed again, and for a survey.
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
    """Elements that ZeRO-3 gathers for one pass: every weight before its layer, and again on the way back where more than
    ``max_reuse_distance`` elements are used between both, which is twice those behind it.
    """
    behind, total = 0.0, 0.0
    wanted = {weight.name for weight in weights}
    reach = division.setting("max_reuse_distance")
    survey = division.survey.student
    again = 2 + division.recipe.activation_checkpointing + survey
    stays = not survey  # a forward pass alone makes DeepSpeed forget what is used next
    for weight in reversed(division.counts.weights):
        elements = division.local([weight])
        if not division.persistent(weight) and weight.name in wanted:
            total += elements * (1 if stays and 2 * behind < reach else again)
        behind += elements
    return total
