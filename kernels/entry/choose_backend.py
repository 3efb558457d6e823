"""Chooses which path runs experts on a device: Triton's, the CPU's, or the reference; the choice and its reason are logged."""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from typing import cast

import torch

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.kernels.layout.devices import interpreted, why_not
from upcycle.kernels.layout.expert_weights import Backend

TRITON, CPU, REFERENCE = "triton", "cpu", "reference"
KERNELS_VARIABLE = "UPCYCLE_KERNELS"
NAME, LEAN = "upcycle", "upcycle_lean"
_MODULES = {
    TRITON: "upcycle.kernels.gpu.backend",
    CPU: "upcycle.kernels.cpu.backend",
    REFERENCE: "upcycle.kernels.layout.reference",
}
_log = logging.getLogger("upcycle.kernels")


def chosen(device: torch.device, dtype: torch.dtype) -> str:
    """``triton``, ``cpu`` or ``reference``, for experts of a dtype on a device; each answer is logged when it is first given.

    Raises:
        UsageError: ``UPCYCLE_KERNELS`` names no path, or one that does not run on the device.
        EnvironmentFault: it names Triton, which is not installed or does not know the GPU.
    """
    return _chosen(device.type, device.index, dtype, os.environ.get(KERNELS_VARIABLE, ""))


def backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The module of the path that :func:`chosen` names."""
    return _module(chosen(device, dtype))


@lru_cache
def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(_MODULES[name]))


@lru_cache
def _chosen(kind: str, index: int | None, dtype: torch.dtype, wanted: str) -> str:
    path, reason = _choice(kind, index, dtype, wanted)
    level = logging.WARNING if path == REFERENCE else logging.INFO
    _log.log(level, "experts in %s on %s run on the %s path: %s", str(dtype).removeprefix("torch."), kind, path, reason)
    return path


def _choice(kind: str, index: int | None, dtype: torch.dtype, wanted: str) -> tuple[str, str]:
    if wanted not in ("", TRITON, CPU, REFERENCE):
        raise UsageError(
            f"{KERNELS_VARIABLE} is '{wanted}'", hint=f"set it to {TRITON}, {CPU} or {REFERENCE}, or unset it"
        )
    if wanted == REFERENCE:
        return REFERENCE, f"{KERNELS_VARIABLE} asks for it"
    if kind == "cpu":
        if wanted == TRITON and not interpreted():
            raise UsageError(
                f"{KERNELS_VARIABLE} is '{TRITON}', and the tensors are on the CPU", hint=f"unset {KERNELS_VARIABLE}"
            )
        return (TRITON, "interpreted") if wanted == TRITON else (CPU, "the tensors are there")
    if wanted == CPU:
        raise UsageError(
            f"{KERNELS_VARIABLE} is '{CPU}', and the tensors are on {kind}", hint=f"unset {KERNELS_VARIABLE}"
        )
    device = torch.device(kind if index is None else f"{kind}:{index}")
    obstacle = "the Triton kernels sum in fp32" if dtype == torch.float64 else why_not(device)
    if obstacle is None:
        return TRITON, "a GPU that it knows"
    if wanted == TRITON:
        raise EnvironmentFault(
            f"{KERNELS_VARIABLE} is '{TRITON}': {obstacle}", hint=f"unset {KERNELS_VARIABLE} for the slow reference"
        )
    return REFERENCE, f"{obstacle}; it is slow: take another experts_implementation"
