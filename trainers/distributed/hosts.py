"""Ranks on the machines of a host file: one ssh connection to each, which carries the start, the signals and the end.

What starts the ranks there is :mod:`upcycle.cli.host_ranks`. It reads from the connection, so that a launcher that is
killed, or a connection that breaks, ends the ranks as a signal would: they save.
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
KILL = "KILL"  # a line to the agent, beside the names of signals
_SSH_FAILED = 255
_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[1-9]\d{0,5})")
_HINT = "one line per machine: NAME slots=RANKS"
_ANSWER = 20  # seconds that a machine has to answer
# What else of the environment goes to other machines, beside what says where ranks meet.
_PREFIXES = ("CUDA_", "DS_", "FI_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTHON", "TOKENIZERS_", "TORCH_", "TRITON_", "UCX_",
             "UPCYCLE_", "WANDB_", "XDG_")  # fmt: skip


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes."""

    name: str
    ranks: int

    @property
    def local(self) -> bool:
        """Whether it is this machine: no connection is needed."""
        own = socket.gethostname()
        return self.name in ("localhost", "127.0.0.1", "::1", own, own.partition(".")[0])


def read_hosts(path: Path, nproc: int | None) -> list[Host]:
    """The machines of a host file (``NAME slots=N`` a line), each with ``nproc`` ranks, or as many as it has slots.

    Raises:
        UsageError: there is no such file, nothing in it, or a machine is there twice or has fewer slots.
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
            raise UsageError(f"{path}: '{host.name}' is no name of a machine", hint=_HINT)
        if host.name in (other.name for other in found):
            raise UsageError(f"{path}: '{host.name}' is there twice", hint="one line for all its ranks")
        if nproc and nproc > host.ranks:
            raise UsageError(
                f"{path}: {host.name} has {host.ranks} slots, and --nproc is {nproc}", hint="lower --nproc"
            )
        found.append(Host(host.name, nproc or host.ranks))
    if not found:
        raise UsageError(f"{path}: no machine in it", hint=_HINT)
    return found


def launch_hosts(arguments: Sequence[str], hostfile: Path, nproc: int | None) -> int:
    """Run ``upcycle ARGUMENTS`` on the machines of a host file; returns the exit code, see :func:`launcher.wait`.

    The folder in which the command was given and this Python must be there under the same names.

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
            hint=f"`ssh {lost} true` must work without a password; the same command continues",
        )
    return code


class _Agent(Started):
    """The ranks of one machine."""

    def __init__(self, host: Host, arguments: Sequence[str], first: int, place: dict[str, str]) -> None:
        self.host = host
        command = run_module(AGENT)
        if not host.local:
            command = [*_ssh(host), shlex.join(["exec", *command])]
        self._local = Local(command, os.environ, control=True)
        told = {
            "arguments": list(arguments),
            "ranks": [first, first + host.ranks],
            "folder": str(Path.cwd()),
            "environment": {**{k: v for k, v in os.environ.items() if k.startswith(_PREFIXES)}, **place},
        }
        # Not on the command line, where everybody on both machines could read it.
        self._tell(json.dumps(told))

    def code(self) -> int | None:
        """See :class:`Started`."""
        return self._local.code()

    def send(self, number: int) -> None:
        """See :class:`Started`."""
        self._tell(signal.Signals(number).name)

    def kill(self) -> None:
        """See :class:`Started`."""
        self._tell(KILL)
        with suppress(subprocess.TimeoutExpired):
            self._local.process.wait(_ANSWER)
        self._local.kill()

    def _tell(self, line: str) -> None:
        pipe = self._local.process.stdin
        assert pipe is not None
        with suppress(OSError):  # it has ended, as its exit code will say
            pipe.write(line.encode() + b"\n")
            pipe.flush()


def _ssh(host: Host) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER}", host.name]


def _address(hosts: Sequence[Host]) -> str:
    """Where ranks meet: the first machine's own first address, as others may know it by another name."""
    if all(host.local for host in hosts):
        return "127.0.0.1"
    command = ["hostname", "-I"] if hosts[0].local else [*_ssh(hosts[0]), "hostname -I"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise EnvironmentFault(
            f"{hosts[0].name} of the host file does not say its address: {said[-1] if said else error}",
            hint="set MASTER_ADDR to an address of it that all machines can reach",
        ) from None
    if not answer.stdout.split():
        raise EnvironmentFault(f"{hosts[0].name} of the host file has no address", hint="set MASTER_ADDR")
    return answer.stdout.split()[0]
