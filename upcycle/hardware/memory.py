"""Memory of the host that a training step frees stays with the process, for the next step."""

from __future__ import annotations

import ctypes
import resource
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

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


def reuse_freed_memory(largest: int) -> None:
    """Let freed blocks up to ``largest`` bytes be used again, instead of asking the system for zeroed pages every time.

    Passes over tokens allocate the same tens of megabytes over and over; touching new pages costs them a sixth of their
    time. As much freed memory stays with the process. Does nothing where the C library is not glibc, nor where address
    space is rationed.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, largest)
    mallopt(_M_TRIM_THRESHOLD, 4 * largest)


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
