"""Memory of the host that a training step frees stays with the process, for the next step."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of <malloc.h>
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's allocator not to give freed memory back to the system; from now on, in the whole process.

    Every step of training frees and allocates logits, gradients and activations anew. By default glibc maps so large blocks one by
    one (``M_MMAP_THRESHOLD`` in mallopt(3) cannot be more than 32 MiB), and the system clears each page when it is first
    touched: on a CPU more than a tenth of a step (``tests/benchmarks/training/train_speed.py``). The price is memory, up to
    twice as much in long runs: freed blocks between others are used again only by what fits.

    Returns:
        Whether it could be done; other C libraries have no such settings, or none that do the same.
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - only glibc has it
        settings = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(settings(_MMAP_MAX, 0) and settings(_TRIM_THRESHOLD, _NEVER))
