"""Chooses the dtype in which a model is timed: that in which its users run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from upcycle.errors import UsageError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
TIMED_DTYPES = (AUTO, "float32", "bfloat16", "float16")


def timed_dtype(wanted: str, config: Mapping[str, Any], device: str = "cpu") -> torch.dtype:
    """Return the dtype that is timed.

    A 16-bit dtype changes which model is faster: its products take a fraction of the time, and what surrounds them takes the same.

    Args:
        wanted: one of :data:`TIMED_DTYPES`; ``auto``: the stored one, as transformers loads a model, but fp32 on a CPU without
            instructions that multiply it.
        config: the model's ``config.json``; empty for a file, which is read in fp32.
        device: ``cpu`` or ``cuda``.

    Raises:
        UsageError: there is no such dtype.
    """
    if wanted not in TIMED_DTYPES:
        raise UsageError(f"there is no dtype '{wanted}' to time", hint=f"one of {', '.join(TIMED_DTYPES)}")
    import torch  # late: the command line names the dtypes without it

    from upcycle.kernels.cpu.products import fast_natively

    text = config.get("text_config")
    told = [part.get(key) for part in (config, text or {}) for key in ("dtype", "torch_dtype")]
    name = next((one for one in told if one in TIMED_DTYPES), "float32") if wanted == AUTO else wanted
    dtype: torch.dtype = getattr(torch, name)
    slow = wanted == AUTO and device == "cpu" and dtype.itemsize == 2 and not fast_natively(dtype)
    return torch.float32 if slow else dtype
