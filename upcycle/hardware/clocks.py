"""The clock by which work on this machine is timed."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, process_time

import torch


def clock() -> Callable[[], float]:
    """Return the clock to time with: the process's own time where it has one thread, which no other process can lengthen."""
    return process_time if torch.get_num_threads() == 1 else perf_counter
