"""Peak rates of accelerators from their vendors' data sheets: the one table that every estimate uses."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.errors import UsageError
from upcycle.registry import suggestion


@dataclass(frozen=True)
class Device:
    """Peak rates of one device, which real work never reaches.

    ``flops`` are of dense bfloat16 products, ``link`` and ``network`` bytes per second that one device can send: to others
    in its machine, and to other machines when each device has a network adapter of its own, as in the vendor's systems.
    """

    name: str
    title: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int
    source: str

    @property
    def kind(self) -> str:
        """Torch's type of device: ``cpu`` or ``cuda``."""
        return "cpu" if self.name == "cpu" else "cuda"


# NVLink is sold by the sum of both directions; link is one. Networks are 200 Gb/s (HDR) or 400 Gb/s (NDR) for each device.
_LISTED = (
    Device(
        "A100-40GB", "A100 SXM 40 GB", 312e12, 40e9, 1.555e12, 300e9, 25e9, 8,
        "NVIDIA A100 data sheet; DGX A100: 8 x 200 Gb/s",
    ),
    Device(
        "A100", "A100 SXM 80 GB", 312e12, 80e9, 2.039e12, 300e9, 25e9, 8,
        "NVIDIA A100 data sheet; DGX A100: 8 x 200 Gb/s",
    ),
    Device(
        "H100", "H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9, 8,
        "NVIDIA H100 data sheet (half of the rate with sparsity); DGX H100: 8 x 400 Gb/s",
    ),
    Device(
        "H200", "H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9, 8,
        "NVIDIA H200 data sheet (half of the rate with sparsity); DGX H200: 8 x 400 Gb/s",
    ),
    Device(
        "B200", "B200", 2250e12, 180e9, 8e12, 900e9, 50e9, 8,
        "NVIDIA DGX B200 data sheet, an eighth of it (half of the rate with sparsity); 8 x 400 Gb/s",
    ),
    Device(
        "L40S", "L40S", 362e12, 48e9, 0.864e12, 32e9, 25e9, 8,
        "NVIDIA L40S data sheet; no NVLink: PCIe 4.0 x16; a network of 200 Gb/s for each is assumed",
    ),
)  # fmt: skip
DEVICES = {device.name: device for device in _LISTED}


def device(name: str) -> Device:
    """The device of this name, whatever its case.

    Raises:
        UsageError: it is not in the table.
    """
    known = {key.lower(): found for key, found in DEVICES.items()}
    if name.lower() not in known:
        raise UsageError(f"unknown device '{name}'", hint=suggestion(name, [*DEVICES, "cpu"]))
    return known[name.lower()]


def named_like(full: str) -> Device | None:
    """The device that a driver's name means, such as ``NVIDIA H100 80GB HBM3``; ``None`` if the table has none."""
    words = full.replace("-", " ").split()
    found = [each for each in _LISTED if each.name.split("-")[0] in words]
    small = [each for each in found if each.name.endswith("40GB") and any(word.startswith("40GB") for word in words)]
    plain = [each for each in found if "-" not in each.name]
    return next(iter(small or plain), None)
