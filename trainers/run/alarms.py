"""Alarms for what goes wrong in MoE training without an error: dead experts, collapsed routers, loss spikes, NaN. E experts."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from upcycle.trainers.recipe.part_recipes import AlarmParameters

AlarmKind = Literal["dead expert", "router collapse", "identical experts", "loss spike"]


@dataclass(frozen=True)
class Alarm:
    """One warning: what is wrong, since which step, and in which layer (``None``: the whole model)."""

    kind: AlarmKind
    step: int
    layer: int | None
    message: str


class Alarms:
    """Watches the steps of a run. An alarm is raised once, and again only after its cause has gone and come back."""

    def __init__(self, parameters: AlarmParameters) -> None:
        self.parameters = parameters
        self._idle: dict[int, list[int]] = {}  # steps in a row without a token, by layer and expert
        self._low: dict[int, int] = {}  # steps in a row of low entropy, by layer
        self._same: set[int] = set()  # layers whose experts were found to be copies
        self._losses: deque[float] = deque(maxlen=parameters.spike_window)
        self._spiking = False

    def loads(
        self,
        step: int,
        counts: Mapping[int, torch.Tensor],
        top_k: int,
        dropped: Mapping[int, torch.Tensor] | None = None,
    ) -> list[Alarm]:
        """Alarms about dead experts and collapsed routers after one step.

        Args:
            step: of the run.
            counts: how many tokens of all ranks chose each expert, ``[E]`` by layer.
            top_k: experts per token.
            dropped: which experts no token might choose, bool ``[E]`` by layer. They are not alarmed about, nor was it the router
                that left them out.
        """
        found = []
        for layer, count in counts.items():
            gone = (dropped or {}).get(layer, torch.zeros(len(count), dtype=torch.bool))
            found += self._dead(step, layer, count, gone)
            found += self._collapse(step, layer, count[~gone], top_k)
        return found

    def similarities(self, step: int, cosines: Mapping[int, float]) -> list[Alarm]:
        """Alarms about experts that are still copies, from every layer's :func:`expert_similarity`."""
        limits, found = self.parameters, []
        for layer, cosine in cosines.items():
            same = cosine > limits.identical_cosine and step >= limits.identical_after
            if same and layer not in self._same:
                found.append(
                    Alarm(
                        "identical experts",
                        step,
                        layer,
                        f"after {step} steps the experts of layer {layer} are still copies (mean cosine {cosine:.4f}): "
                        "raise the learning rate (back to half the dense run's peak), or add noise to the router",
                    )
                )
            (self._same.add if same else self._same.discard)(layer)
        return found

    def loss(self, step: int, value: float) -> list[Alarm]:
        """An alarm if the loss of a step, in nats, is far above those before it."""
        limits = self.parameters
        if len(self._losses) == limits.spike_window:
            median = statistics.median(self._losses)
            # 1.4826 turns the median deviation of a normal distribution into its standard deviation.
            spread = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
            if value > median + limits.spike_deviations * max(spread, 1e-3 * abs(median)):
                already, self._spiking = self._spiking, True
                text = f"loss {value:.4g} at step {step}; the median of the last {limits.spike_window} was {median:.4g}"
                return [] if already else [Alarm("loss spike", step, None, text)]
        self._spiking = False
        self._losses.append(value)  # a spike is left out: it would raise the bar for the next one
        return []

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON."""
        return {
            "idle": {str(layer): list(steps) for layer, steps in self._idle.items()},
            "low": {str(layer): steps for layer, steps in self._low.items()},
            "same": sorted(self._same),
            "losses": list(self._losses),
            "spiking": self._spiking,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self._idle = {int(layer): list(steps) for layer, steps in state["idle"].items()}
        self._low = {int(layer): steps for layer, steps in state["low"].items()}
        self._same, self._spiking = set(state["same"]), state["spiking"]
        self._losses = deque(state["losses"], maxlen=self.parameters.spike_window)

    def _dead(self, step: int, layer: int, count: torch.Tensor, gone: torch.Tensor) -> list[Alarm]:
        before, out = self._idle.get(layer, [0] * len(count)), gone.tolist()
        now = zip(before, (count > 0).tolist(), out, strict=True)
        self._idle[layer] = [steps if absent else 0 if used else steps + 1 for steps, used, absent in now]
        idle = zip(self._idle[layer], out, strict=True)
        dead = [e for e, (steps, absent) in enumerate(idle) if steps == self.parameters.dead_steps and not absent]
        if not dead:
            return []
        text = f"layer {layer}: no token chose expert {', '.join(map(str, dead))} in {self.parameters.dead_steps} steps"
        return [Alarm("dead expert", step, layer, f"{text}: raise the balance loss's coefficient")]

    def _collapse(self, step: int, layer: int, count: torch.Tensor, top_k: int) -> list[Alarm]:
        entropy = load_entropy(count, top_k)
        low = self._low.get(layer, 0) + 1 if entropy < self.parameters.collapse_entropy else 0
        self._low[layer] = low
        if low != self.parameters.collapse_steps:
            return []
        text = f"layer {layer}: the router has collapsed onto few experts (load entropy {entropy:.2f} of 1)"
        return [Alarm("router collapse", step, layer, f"{text}: raise the balance loss's coefficient, or add router_z")]


def load_entropy(count: torch.Tensor, top_k: int) -> float:
    """The entropy of the experts' loads, scaled so that 0 is its minimum and 1 its maximum.

    The minimum is ``log k``, where k experts take every token; the maximum is ``log E``, where all are chosen equally often.

    Args:
        count: how many tokens chose each expert, ``[E]``.
        top_k: k.
    """
    experts = len(count)
    if experts == top_k or not count.any():
        return 1.0
    share = count.double() / count.sum()
    entropy = float(-torch.special.xlogy(share, share).sum())
    return (entropy - math.log(top_k)) / (math.log(experts) - math.log(top_k))


def expert_similarity(experts: torch.Tensor) -> float:
    """Mean cosine between the weights ``[E, ...]`` of different experts: 1 for copies, 0 for a single expert.

    Skywork-MoE (arXiv 2406.06563) monitors it. It is computed as ``(|sum_i u_i|^2 - E) / (E (E - 1))`` from the normalised
    rows ``u_i``, which needs no matrix of pairs.
    """
    rows = experts.detach().flatten(1).float()
    if len(rows) == 1:
        return 0.0
    units = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    count = len(rows)
    return float((units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1)))


class NanPolicy:
    """What to do about steps whose loss or gradient is not finite: skip up to ``most`` in a row, then stop."""

    def __init__(self, most: int = 3) -> None:
        self.most, self._in_a_row = most, 0

    def decide(self, *values: float) -> Literal["go", "skip", "stop"]:
        """``go`` if all values are finite. Every rank must pass the same values, summed over ranks, to decide the same."""
        if all(map(math.isfinite, values)):
            self._in_a_row = 0
            return "go"
        self._in_a_row += 1
        return "skip" if self._in_a_row <= self.most else "stop"
