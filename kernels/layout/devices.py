"""Whether Triton kernels can run on a device. This module needs no Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from upcycle.errors import EnvironmentFault

OLDEST = (8, 0)
"""Ampere: bf16 tensor cores and asynchronous copies."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, for tests; decided when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on a device; ``None`` where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted() or device.type == "meta":
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, and this is {device.type}"
    if torch.version.hip:
        return "Triton kernels are verified for NVIDIA GPUs only, and this is an AMD one"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"Triton kernels need sm_80 or newer, and {name} is sm_{capability[0]}{capability[1]}"
    return None


def gpu() -> torch.device:
    """The current CUDA device, which kernels can be timed on.

    Raises:
        EnvironmentFault: Triton is missing, there is no CUDA device, or it is too old.
    """
    if find_spec("triton") is None:
        raise EnvironmentFault("Triton is not installed", hint="pip install 'upcycle[kernels]'")
    if not torch.cuda.is_available():
        raise EnvironmentFault(
            "timing kernels needs a CUDA device, and torch sees none",
            hint="where there is a GPU, install torch for its CUDA version; the shipped tiles work without tuning",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    reason = why_not(device)
    if reason:
        raise EnvironmentFault(reason, hint="the experts run in plain torch there")
    return device
