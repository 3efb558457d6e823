"""Starts the ranks of a run on this machine, or on those of a host file through DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from upcycle.errors import EnvironmentFault, UsageError

_MODULE = "upcycle.cli.main"
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []  # nothing is imported from where the command was given
_GRACE = 600.0  # seconds that ranks have to save after a signal
_AFTER_FAILURE = 15.0  # seconds that the others have to say why, once one has failed


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run ``upcycle ARGUMENTS`` as ``nproc`` ranks here; returns the exit code of the first rank that failed, or 0.

    SIGTERM and SIGINT are handed on. When a rank fails, the others are ended.
    """
    environment = {**os.environ, "WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    threads = str(max(1, (os.cpu_count() or nproc) // nproc))
    environment.setdefault("OMP_NUM_THREADS", threads)
    ranks = [
        subprocess.Popen(
            [sys.executable, *_SAFE_PATH, "-m", _MODULE, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(nproc)
    ]

    def hand_on(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed, since = 0, 0.0
    while [rank for rank in ranks if rank.poll() is None]:  # all are asked, not only up to the first that runs
        codes = [rank.returncode for rank in ranks if rank.returncode]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > _AFTER_FAILURE:
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
            time.sleep(1)
            break
        time.sleep(0.05)
    codes = [rank.returncode for rank in ranks if rank.returncode]
    code = failed or next(iter(codes), 0)
    return code if code >= 0 else 128 - code


def launch_hosts(arguments: Sequence[str], hostfile: Path, nproc: int | None) -> int:
    """Run ``upcycle ARGUMENTS`` on the machines of a host file (``NAME slots=N`` a line); returns DeepSpeed's exit code.

    Raises:
        UsageError: there is no such file, or nothing in it.
        EnvironmentFault: DeepSpeed is not installed.
    """
    if not hostfile.is_file():
        raise UsageError(f"no such host file: {hostfile}", hint="one line per machine: NAME slots=RANKS")
    lines = [line.split("#")[0].strip() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    wrong = next((line for line in lines if line and "slots=" not in line), None)
    if wrong or not any(lines):
        raise UsageError(f"{hostfile}: cannot read '{wrong or ''}'", hint="one line per machine: NAME slots=RANKS")
    return subprocess.run(hosts_command(arguments, hostfile, nproc), check=False).returncode


def hosts_command(arguments: Sequence[str], hostfile: Path, nproc: int | None) -> list[str]:
    """What :func:`launch_hosts` runs.

    Raises:
        EnvironmentFault: DeepSpeed is not installed.
    """
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise EnvironmentFault("training needs DeepSpeed", hint="pip install 'upcycle[train]'")
    count = ["--num_gpus", str(nproc)] if nproc else []
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *count),
        *("--no_local_rank", "--module", _MODULE, *arguments),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
