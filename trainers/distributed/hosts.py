"""Starts ranks on the machines of a host file, over one ssh connection to each.

The connection carries the command, the signals and the exit code. At its other end :mod:`upcycle.cli.host_ranks` starts the
ranks and reads from it. If the launcher is killed or the connection breaks, the ranks stop as they do after a signal: they save.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.hardware.child_processes import run_module
from upcycle.trainers.distributed.launcher import Local, Started, wait

AGENT = "upcycle.cli.host_ranks"
KILL = "KILL"  # what the agent is sent to kill its ranks; other lines are names of signals
_SSH_FAILED = 255  # the exit code of ssh itself
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9]\d{0,5})")
_HINT = "one line per machine: NAME slots=RANKS"
_ANSWER = 20  # seconds for a machine to answer
# Variables of this environment that ranks on other machines get, too.
_PREFIXES = ("CUDA_", "DS_", "FI_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTHON", "TOKENIZERS_", "TORCH_", "TRITON_", "UCX_",
             "UPCYCLE_", "WANDB_", "XDG_")  # fmt: skip


@dataclass(frozen=True)
class Host:
    """A machine, and how many ranks run on it."""

    name: str
    ranks: int

    @property
    def local(self) -> bool:
        """Whether it is this machine, so that no connection is needed."""
        here = socket.gethostname()
        return self.name in ("localhost", "127.0.0.1", "::1", here, here.partition(".")[0])


def read_hosts(path: Path, nproc: int | None) -> list[Host]:
    """The machines of a host file, which has a line ``NAME slots=N`` for each.

    Args:
        path: the file.
        nproc: ranks on each machine; ``None``: as many as its line gives.

    Raises:
        UsageError: the file is missing, empty or malformed, or a machine is listed twice or its line gives fewer than ``nproc`` ranks.
    """
    if not path.is_file():
        raise UsageError(f"no such host file: {path}", hint=_HINT)
    found: list[Host] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UsageError(f"{path}: cannot read '{text}' in line {number}", hint=_HINT)
        host = Host(match["name"], int(match["slots"]))
        if host.name.startswith("-"):
            raise UsageError(f"{path}: '{host.name}' is not the name of a machine", hint=_HINT)
        if host.name in (other.name for other in found):
            raise UsageError(
                f"{path}: '{host.name}' is listed twice", hint="give each machine one line for all its ranks"
            )
        if nproc and nproc > host.ranks:
            raise UsageError(
                f"{path}: {host.name} has slots={host.ranks}, and --nproc is {nproc}", hint="lower --nproc"
            )
        found.append(Host(host.name, nproc or host.ranks))
    if not found:
        raise UsageError(f"{path} lists no machine", hint=_HINT)
    return found


def launch_hosts(arguments: Sequence[str], hostfile: Path, nproc: int | None) -> int:
    """Run ``upcycle ARGUMENTS`` on the machines of a host file; returns the exit code that :func:`launcher.wait` gives.

    The current folder and this Python must exist under the same paths on every machine.

    Raises:
        UsageError: see :func:`read_hosts`.
        EnvironmentFault: a machine cannot be reached.
    """
    hosts = read_hosts(hostfile, nproc)
    place = {
        "WORLD_SIZE": str(sum(host.ranks for host in hosts)),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _address(hosts),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(random.randint(20_000, 32_000)),
    }
    first, agents = 0, []
    for host in hosts:
        agents.append(_Agent(host, arguments, first, place))
        first += host.ranks
    code = wait(agents)
    lost = next((agent.host.name for agent in agents if not agent.host.local and agent.code() == _SSH_FAILED), None)
    if code == _SSH_FAILED and lost:
        raise EnvironmentFault(
            f"the ssh connection to {lost} failed or broke",
            hint=f"`ssh {lost} true` must work without a password; run the same command again to continue",
        )
    return code


class _Agent(Started):
    """The agent that starts the ranks of one machine, here or at the other end of an ssh connection."""

    def __init__(self, host: Host, arguments: Sequence[str], first: int, place: dict[str, str]) -> None:
        self.host = host
        command = run_module(AGENT)
        if not host.local:
            command = [*_ssh(host), shlex.join(["exec", *command])]
        self._local = Local(command, os.environ, control=True)
        orders = {
            "arguments": list(arguments),
            "ranks": [first, first + host.ranks],
            "folder": str(Path.cwd()),
            "environment": {**{k: v for k, v in os.environ.items() if k.startswith(_PREFIXES)}, **place},
        }
        # Not on the command line, where every user of both machines could read the environment.
        self._send_line(json.dumps(orders))

    def code(self) -> int | None:
        """See :class:`Started`."""
        return self._local.code()

    def send(self, number: int) -> None:
        """See :class:`Started`."""
        self._send_line(signal.Signals(number).name)

    def kill(self) -> None:
        """See :class:`Started`."""
        self._send_line(KILL)
        with suppress(subprocess.TimeoutExpired):
            self._local.process.wait(_ANSWER)
        self._local.kill()

    def _send_line(self, line: str) -> None:
        pipe = self._local.process.stdin
        assert pipe is not None
        with suppress(OSError):  # the agent has ended, which its exit code will tell
            pipe.write(line.encode() + b"\n")
            pipe.flush()


def _ssh(host: Host) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER}", host.name]


def _address(hosts: Sequence[Host]) -> str:
    """The address at which ranks meet: the first one that the first machine reports, as its name may differ elsewhere."""
    if all(host.local for host in hosts):
        return "127.0.0.1"
    command = ["hostname", "-I"] if hosts[0].local else [*_ssh(hosts[0]), "hostname -I"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise EnvironmentFault(
            f"the address of {hosts[0].name}, the host file's first machine, was not found: {lines[-1] if lines else error}",
            hint="set MASTER_ADDR to an address of that machine that all others can reach",
        ) from None
    if not answer.stdout.split():
        raise EnvironmentFault(
            f"{hosts[0].name}, the host file's first machine, reports no address", hint="set MASTER_ADDR"
        )
    return answer.stdout.split()[0]
