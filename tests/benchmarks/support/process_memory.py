"""The memory of a command and of all its children: what they have of their own, and what they have of files.

``VmHWM`` and ``ru_maxrss`` are of one process, and do not say what they are made of. Here the whole tree is looked at every
twentieth of a second; a peak that is shorter than that is missed, which is why the kernel's own peak of the largest process is kept
beside, and the larger of both counts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY = 0.05
_KILO = 1024


@dataclass(frozen=True)
class Used:
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        peak: the largest resident set of the tree, bytes.
        own: the anonymous part of it at that moment: what the processes allocated.
        files: the part of it that is of mapped files: libraries, and what else is mapped.
        processors: seconds of all processors, of the process and the children that it waited for.
    """

    seconds: float
    peak: int
    own: int
    files: int
    processors: float


def measured(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Used:
    """Run a command to its end.

    What others have written is flushed first, so that nobody pays for somebody else's bytes.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    os.sync()
    words = [str(word) for word in command]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
    ) as process:
        started, done = time.perf_counter(), threading.Event()
        peaks: list[tuple[int, int, int]] = []
        watcher = threading.Thread(target=_watch, args=(process.pid, done, peaks))
        watcher.start()
        try:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.send_signal(signal.SIGTERM)  # an interrupted benchmark leaves nothing running
            raise
        finally:
            done.set()
            watcher.join()
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = output.decode(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{end}")
    largest = max(peaks, default=(0, 0, 0))
    kernel = usage.ru_maxrss * (1 if sys.platform == "darwin" else _KILO)
    return Used(seconds, max(largest[0], kernel), largest[1], largest[2], usage.ru_utime + usage.ru_stime)


def _watch(pid: int, done: threading.Event, peaks: list[tuple[int, int, int]]) -> None:
    """Keep the largest sum of the tree's resident sets, with its parts."""
    best = (0, 0, 0)
    while not done.wait(_EVERY):
        own = files = 0
        try:
            tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        except psutil.Error:
            continue
        for one in tree:
            a, f = _parts(one)
            own, files = own + a, files + f
        best = max(best, (own + files, own, files))
    peaks.append(best)


def _parts(pid: int) -> tuple[int, int]:
    """Return the bytes of a process that are its own, and those of files and of shared memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it ended
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * _KILO for line in lines if line.startswith("Rss")}
    return sizes.get("RssAnon", 0), sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)
