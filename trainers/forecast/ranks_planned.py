"""The ranks that a run is planned for, from texts such as ``2x8xH100``."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from upcycle.errors import UsageError
from upcycle.hardware.accelerators import Device, device, named_like

_FORM = re.compile(r"(?:(\d+)x)?(\d+)(?:x([A-Za-z][\w-]*))?")
_EXAMPLES = "8xH100, 2x8xH100 (machines x devices), or 4 (ranks on CPUs here)"


@dataclass(frozen=True)
class World:
    """The ranks of a planned run: one per device, on ``nodes`` machines with ``per_node`` devices each."""

    device: Device
    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.per_node

    def __str__(self) -> str:
        several = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{several}{self.per_node}x{self.device.name}"

    def spread(self, ranks: int, stride: int = 1) -> tuple[int, int]:
        """For a group of ``ranks`` whose numbers are ``stride`` apart: how many machines it spans, and how many are on each."""
        on_one = max(1, min(ranks, self.per_node // stride))
        return ranks // on_one, on_one


def parse_world(text: str | None) -> World:
    """The ranks that ``--world`` names.

    Args:
        text: ``8xH100``, ``2x8xH100``, a number of ranks on this machine's CPUs, or ``None``: this machine as it is.

    Raises:
        UsageError: the text has another form, names an unknown device or no ranks, or leaves a machine partly used.
    """
    if text is None:
        return _here()
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--world: cannot read '{text}'", hint=f"use a form such as {_EXAMPLES}")
    nodes, count, name = match.groups()
    if not int(count) or (nodes and not int(nodes)):
        raise UsageError(f"--world {text}: no ranks", hint=f"use a form such as {_EXAMPLES}")
    if name is None or name.lower() == "cpu":
        if nodes:
            raise UsageError(
                f"--world {text}: runs on CPUs can be planned for this machine alone", hint=f"use --world {count}"
            )
        return World(cpu(int(count)), 1, int(count))
    kind, ranks = device(name), int(count)
    if nodes:
        return World(kind, int(nodes), ranks)
    if ranks <= kind.per_node:
        return World(kind, 1, ranks)
    if ranks % kind.per_node:
        raise UsageError(
            f"--world {text}: {ranks} devices do not fill machines of {kind.per_node}",
            hint=f"use a multiple of {kind.per_node}, or give machines x devices, such as {ranks // 2}x2x{kind.name}",
        )
    return World(kind, ranks // kind.per_node, kind.per_node)


def _here() -> World:
    if not torch.cuda.is_available():
        return World(cpu(1), 1, 1)
    full = torch.cuda.get_device_name()
    kind = named_like(full)
    if kind is None:
        raise UsageError(
            f"the speed and memory of this machine's {full} are not known", hint=f"give --world {_EXAMPLES}"
        )
    return World(kind, 1, torch.cuda.device_count())


def cpu(ranks: int) -> Device:
    """One rank's share of this machine's CPUs: free memory as the system reports it, and rates measured in some 0.2 s.

    What ranks send each other goes through memory, where both sides read and write it.
    """
    from upcycle.hardware.memory import available_memory
    from upcycle.trainers.forecast.flops import measured_bandwidth, measured_peak

    host = torch.device("cpu")
    moved = measured_bandwidth() / ranks
    return Device(
        name="cpu",
        title="CPUs of this machine",
        flops=measured_peak(host, torch.float32) / ranks,
        memory=available_memory() / ranks,
        bandwidth=moved,
        link=moved / 2,
        network=moved / 2,
        per_node=ranks,
        source="fp32 product and copy measured here; free memory",
    )
