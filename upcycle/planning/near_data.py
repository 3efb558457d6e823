"""Simulates where experts are computed when they lie in another memory than the device's: there, or on the device.

The rule is that of Kim et al., *MoNDE: Mixture of Near-Data Experts* (DAC 2024, arXiv 2405.18832): an expert with many tokens goes
over the link to the device (its parameters move); one with few is computed where it lies, by slower units near that memory (its
tokens' activations move). Both run at the same time, so the H experts with the most tokens go to the device, and H is such that both
are done together.

**Deviations.** MoNDE decides H from a step's own routing; here it is decided once per layer from observed loads. With B tokens per
step, an expert that a token chooses with probability p is used in ``a = 1 - (1 - p)^B`` of all steps, by ``B p / a`` tokens then: its
time is ``a`` times that of so many tokens. H is that with the smallest expected time, found by trying all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import UsageError
from upcycle.methods.compressing.observations import Observations

_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass(frozen=True)
class ComputingUnit:
    """What computes experts: operations and bytes per second. An expert takes the longer of both."""

    flops: float
    memory: float

    def seconds(self, expert: Expert, tokens: float) -> float:
        """Return the time of one expert on so many tokens."""
        return max(2 * expert.parameters * tokens / self.flops, expert.nbytes / self.memory)


@dataclass(frozen=True)
class Expert:
    """Describes one expert: its parameters, their bytes, and the bytes of a token's state that goes in or comes out."""

    parameters: int
    nbytes: float
    state_bytes: float


@dataclass(frozen=True)
class LinkedMemories:
    """Describes where experts can run: the device, what computes near their memory, and the link, in bytes per second."""

    device: ComputingUnit
    near: ComputingUnit
    link: float

    def on_device(self, expert: Expert, tokens: float) -> float:
        """Return the seconds of moving an expert's parameters, and computing it."""
        return expert.nbytes / self.link + self.device.seconds(expert, tokens)

    def near_data(self, expert: Expert, tokens: float) -> float:
        """Return the seconds of moving tokens there and back, and computing the expert where it lies."""
        return 2 * tokens * expert.state_bytes / self.link + self.near.seconds(expert, tokens)

    def moves_parameters(self, expert: Expert, tokens: float) -> bool:
        """Return MoNDE's rule for one expert alone."""
        return self.on_device(expert, tokens) < self.near_data(expert, tokens)


@dataclass(frozen=True)
class LayerPlan:
    """Says what one layer's experts take per step, in seconds.

    Attributes:
        layer: its number.
        device: the experts that go to the device, the one with the most tokens first.
        share: of all tokens of routed experts, those of ``device``.
        worth_moving: how many experts the rule moves, each for itself.
        seconds: the time with ``device`` on the device and the others near their memory.
        all_on_device: the time of moving all parameters that are needed.
        all_near_data: the time of moving activations alone.
    """

    layer: int
    device: tuple[int, ...]
    share: float
    worth_moving: int
    seconds: float
    all_on_device: float
    all_near_data: float


@dataclass(frozen=True)
class RunPlan:
    """Says the same of a model, for steps of ``tokens`` tokens."""

    model: str
    tokens: int
    experts: int
    top_k: int
    expert_bytes: float
    layers: tuple[LayerPlan, ...]

    def total(self, what: str) -> float:
        """Return the sum of one time over the layers."""
        return float(sum(getattr(layer, what) for layer in self.layers))

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, with the sums."""
        sums = {name: self.total(name) for name in ("seconds", "all_on_device", "all_near_data")}
        return {**asdict(self), **sums, "layers": [asdict(layer) for layer in self.layers]}


def used(share: float, tokens: int) -> tuple[float, float]:
    """Return in which part of steps of so many tokens an expert is used, and by how many tokens then.

    ``share`` is the part of all tokens that choose it.
    """
    if share <= 0:
        return 0.0, 0.0
    part = 1 - (1 - min(share, 1.0)) ** tokens
    return part, tokens * share / part


def plan_layer(layer: int, shares: Sequence[float], tokens: int, expert: Expert, machine: LinkedMemories) -> LayerPlan:
    """Decide which experts of a layer go to the device; ``shares`` are the parts of all tokens that choose each."""
    order = sorted(range(len(shares)), key=lambda e: (-shares[e], e))
    uses = [used(shares[e], tokens) for e in order]
    device = [part * machine.on_device(expert, count) for part, count in uses]
    near = [part * machine.near_data(expert, count) for part, count in uses]
    times = [max(sum(device[:h]), sum(near[h:])) for h in range(len(order) + 1)]
    best = times.index(min(times))
    total = sum(shares) or 1.0
    return LayerPlan(
        layer=layer,
        device=tuple(order[:best]),
        share=sum(shares[e] for e in order[:best]) / total,
        worth_moving=sum(machine.moves_parameters(expert, count) for part, count in uses if part),
        seconds=times[best],
        all_on_device=times[-1],
        all_near_data=times[0],
    )


def plan_run(moe: str | Path, observations: str | Path, machine: LinkedMemories, tokens: int = 1) -> RunPlan:
    """Simulate steps of ``tokens`` tokens of a MoE whose experts lie in another memory than the device's.

    Args:
        moe: a local folder or hub id.
        observations: a file that ``upcycle observe`` wrote of this model: how many tokens chose each expert.
        machine: the device, what computes near the experts' memory, and the link.
        tokens: per step: the sequences that are written at the same time, or the length of a prompt.

    Raises:
        UsageError: the observations are of another model, or ``tokens`` is not positive.
        UpcycleError: the model or the file cannot be read.
    """
    if tokens < 1:
        raise UsageError(f"a step has at least 1 token, got {tokens}", hint="--tokens 16")
    checkpoint = MoeCheckpoint.open(str(moe))
    seen = Observations.read(Path(observations))
    if seen.model != checkpoint.fingerprint:
        raise UsageError(
            f"{observations} was observed on other weights than those of {moe}",
            hint=f"upcycle observe {moe} FILE --calibration TEXT",
        )
    model = checkpoint.model
    experts = [spec for name, spec in model.specs.items() if model.role(name) in ("expert", "experts")]
    count = len(model.moe_layers) * model.experts
    elements, nbytes = sum(spec.elements for spec in experts), sum(spec.nbytes for spec in experts)
    width = nbytes / elements  # bytes of a number: states are as wide as weights
    expert = Expert(elements // count, nbytes / count, model.hidden_size * width)
    layers = [
        plan_layer(layer, [float(load) / float(found.tokens) for load in found.load], tokens, expert, machine)
        for layer, found in seen.layers.items()
    ]
    return RunPlan(str(moe), tokens, model.experts, seen.top_k, expert.nbytes, tuple(layers))


def parse_rate(text: str, what: str, unit: str) -> float:
    """Return the number in ``16GB/s`` or ``2TB/s`` (unit ``B/s``), or ``300TFLOPS`` (unit ``FLOPS``).

    Raises:
        UsageError: it is not such a number; the message names ``what``.
    """
    example = "16GB/s" if unit == "B/s" else "300TFLOPS"
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)({re.escape(unit)})?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{what}: '{text}' is no rate", hint=f"{what} {example}")
    return float(match[1]) * _PREFIXES[match[2].upper()]
