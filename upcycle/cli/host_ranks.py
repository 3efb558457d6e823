"""Starts the ranks of one machine of a host file, as the launcher on another machine asks through standard input."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from upcycle.files.formats.parsing import parse_json
from upcycle.trainers.distributed import launcher
from upcycle.trainers.distributed.hosts import KILL
from upcycle.trainers.distributed.launcher import Started, start_ranks, wait
from upcycle.trainers.distributed.told_once import telling_once


def main() -> int:
    """Read the launcher's first line, run the ranks, and pass on the signals that its further lines name.

    When the input ends, the launcher or the connection to it has ended, and nobody sees any more what the ranks do. They are
    then sent SIGTERM, after which they save, and are killed some time later.

    Returns:
        The ranks' exit code.
    """
    line = sys.stdin.readline()
    if not line:
        return 1
    request = parse_json(line, "the launcher's first line")
    try:
        os.chdir(request["folder"])
    except OSError as error:
        from upcycle.cli.shared.output import print_error
        from upcycle.errors import EnvironmentFault

        fault = EnvironmentFault(f"{platform.node()} has no folder {request['folder']}: {error.strerror}")
        print_error(fault)
        return fault.exit_code
    with telling_once() as shared:
        environment = {**os.environ, **request["environment"], **shared}
        ranks = start_ranks(request["arguments"], range(*request["ranks"]), environment)
        threading.Thread(target=_obey, args=(sys.stdin, ranks), daemon=True).start()
        return wait(ranks)


def _obey(lines: TextIO, ranks: Sequence[Started]) -> None:
    """Pass on what the launcher's lines ask for until the input ends; then end the ranks."""
    for line in lines:
        word = line.strip()
        if word == KILL:
            _kill(ranks)
        elif word in signal.Signals.__members__:
            _send(ranks, signal.Signals[word])
    _send(ranks, signal.SIGTERM)
    time.sleep(launcher._GRACE)
    _kill(ranks)


def _send(ranks: Sequence[Started], number: int) -> None:
    for rank in ranks:
        rank.send(number)


def _kill(ranks: Sequence[Started]) -> None:
    for rank in ranks:
        rank.kill()


if __name__ == "__main__":
    sys.exit(main())
