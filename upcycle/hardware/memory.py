"""Memory of the host: how much there is, how much was used, and what glibc does with what is freed.

glibc maps every large block by itself and unmaps it when it is freed; the system then clears each page of the next block when
it is first touched. Code that allocates the same large blocks over and over spends much of its time on that. Two settings help,
one for training and one for passes over calibration text; both hold for the whole process and cannot be taken back.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

# Parameters of mallopt(3), by their numbers in glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
_LARGE = 2**20  # bytes


def keep_freed_memory() -> bool:
    """Make glibc keep all memory that is freed, for training; returns whether that was possible.

    Every training step allocates logits, gradients and activations anew. Clearing their pages takes more than a tenth of a step
    on a CPU (``tests/benchmarks/training/train_speed.py``), and a threshold would not help: the man page promises no more than
    32 MiB, and logits are larger. So no block is mapped by itself, and the heap never shrinks. The price is memory, up to twice
    as much in long runs, because a freed block between others is reused only by what fits into it.

    Returns:
        False where the C library is not glibc, which alone has these settings.
    """
    return _set_glibc({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})


def reuse_freed_memory(largest: int) -> bool:
    """Make glibc reuse freed blocks of up to ``largest`` bytes, for passes over tokens; returns whether that was possible.

    Passes over calibration text allocate the same tens of megabytes for every batch, and clearing pages takes a sixth of their
    time. Unlike :func:`keep_freed_memory` this has a limit: larger blocks, such as a layer's weights, go back to the system, and
    at most four times ``largest`` of free memory stays. The plan of a conversion counts on it (``REUSED_BYTES``).

    Returns:
        False where the C library is not glibc, or where the process may use only so much address space (``ulimit -v``), of
        which a heap with gaps takes more.
    """
    if _address_space_is_limited():
        return False
    return _set_glibc({_MMAP_THRESHOLD: largest, _TRIM_THRESHOLD: 4 * largest})


def unmap_large_blocks() -> bool:
    """Make glibc give every block of a mebibyte and more back when it is freed, for ranks whose memory is scarce.

    By itself, glibc begins to keep blocks once one of their size was freed: its threshold for what is mapped rises to that size, up to
    32 MiB (mallopt(3)), and kept blocks that lie between others are reused only by what fits into them. ZeRO-3 gathers every layer's
    weights anew, in blocks of many sizes, some of them in the threads of gloo, so that a rank came to hold more than the whole
    model. A threshold that is set does not rise. The price is time: the system clears the pages of every gathered weight.

    Returns:
        False where the C library is not glibc, which alone has these settings.
    """
    return _set_glibc({_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: 4 * _LARGE})


def return_freed_memory() -> None:
    """Give the system back what Python and glibc hold of memory that is free, where the C library is glibc.

    transformers leaves the tensors that it converted in cycles of objects, and threads of its own allocate them, so that blocks
    of freed memory stay between others: a model that is read and dropped layer by layer still takes the memory of the whole.
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the host or a device has no memory left."""
    texts = ("allocate memory", "out of memory", "does not fit in memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes; the present one where the system does not keep the largest."""
    import psutil

    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the process was before it became this program
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
        if peak:
            return int(peak.split()[1]) << 10
    now = psutil.Process().memory_info()
    if on_windows := getattr(now, "peak_wset", None):
        return int(on_windows)
    try:
        import resource
    except ImportError:
        return int(now.rss)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _set_glibc(settings: dict[int, int]) -> bool:
    """Set parameters of glibc's allocator; False where there is none, or where it refuses one."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - only glibc has it; what others call mallopt does something else
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    done = [mallopt(parameter, value) for parameter, value in settings.items()]  # all of them, even if one is refused
    return all(done)


def _address_space_is_limited() -> bool:
    import psutil

    # psutil knows the limit on Linux and FreeBSD; glibc is nowhere else.
    return hasattr(psutil, "RLIMIT_AS") and psutil.Process().rlimit(psutil.RLIMIT_AS)[0] != psutil.RLIM_INFINITY
