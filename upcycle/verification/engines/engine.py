"""Defines what upcycle needs of an inference engine: given token ids, it answers with those that it generates greedily.

Every engine runs in a process of its own, if need be with another Python, since engines pin other versions of torch and transformers
than upcycle; and what they leave in memory or on a GPU ends with the process. The scripts in ``workers/`` import nothing of upcycle,
and exchange JSON with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError
from upcycle.files.formats.parsing import parse_json
from upcycle.files.user_paths import user_path
from upcycle.hardware.child_processes import engine_environment, run_script

TAIL = 12
WORKERS = Path(__file__).with_name("workers")


class NotHeld(UpcycleError):  # noqa: N818 - it is an answer
    """The engine cannot run this model; the message says why."""


@dataclass(frozen=True)
class Request:
    """Asks an engine to continue each of ``prompts`` (token ids) by ``tokens`` tokens, and to tokenize ``texts``."""

    prompts: list[list[int]]
    tokens: int
    texts: list[str]

    @property
    def context(self) -> int:
        """The positions that the longest prompt needs with its continuation."""
        return max(map(len, self.prompts)) + self.tokens


@dataclass(frozen=True)
class Written:
    """Holds what an engine generated after one prompt.

    Attributes:
        tokens: the token ids.
        rivals: for each, the two most probable tokens and the difference of their logits; None where the engine does not tell.
    """

    tokens: list[int]
    rivals: list[tuple[int, int, float] | None]


@dataclass(frozen=True)
class Answer:
    """Holds an engine's answer; ``tokenized`` is None where the engine uses transformers' tokenizer."""

    version: str
    dtype: str
    written: list[Written]
    tokenized: list[list[int]] | None


class Engine(Protocol):
    """One inference engine.

    ``name`` is the value of ``--with``, ``title`` the name in messages.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def ask(self, model: Path, config: dict[str, Any], request: Request, work: Path, python: str) -> Answer:
        """Run the model.

        Args:
            model: a stock transformers folder.
            config: its ``config.json``.
            request: what to write.
            work: an empty folder for temporary files.
            python: the Python in which the engine is installed.

        Raises:
            EnvironmentFault: the engine is not installed, or its process died.
            NotHeld: the engine cannot run the model.
        """

    def known_difference(self, model: Path, config: dict[str, Any]) -> str | None:
        """Return why the engine is known to compute something else than transformers, or None.

        Args:
            model: a stock transformers folder.
            config: its ``config.json``.
        """


def run_worker(
    engine: Engine, script: str, question: dict[str, Any], work: Path, python: str, hint: str, **environment: str
) -> dict[str, Any]:
    """Run a worker script with a JSON document on its standard input, and return the one on its standard output.

    Raises:
        EnvironmentFault: there is no such Python, the engine is not installed there, or its process died.
        NotHeld: the worker says that the model cannot be loaded.
    """
    # The process runs elsewhere, and a path is from here. Links are kept: a virtual environment's Python is one.
    if os.sep in python:
        python = os.path.abspath(user_path(python))  # noqa: PTH100
    log = work / "engine.log"
    with log.open("wb") as errors:
        try:
            process = subprocess.Popen(
                run_script(WORKERS / script, python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=work,
                env={**engine_environment(), "HF_HUB_OFFLINE": "1", "UPCYCLE_PARENT": str(os.getpid()), **environment},
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except OSError as error:
            raise EnvironmentFault(f"{python} cannot be run: {error.strerror}", hint="--engine-python PATH") from None
        try:
            output, _ = process.communicate(json.dumps(question).encode())
        finally:
            _end(process)
    try:
        answer: dict[str, Any] = parse_json(output, "its answer", nan=True)
    except CheckpointError:
        raise EnvironmentFault(
            f"{engine.title}'s process ended ({_ending(process.returncode)}) without an answer:\n{last_lines(log)}",
            hint="it may have run out of memory; the last lines of its output are above",
        ) from None
    if "missing" in answer:
        raise EnvironmentFault(f"{engine.title} is not installed for {python}: {answer['missing']}", hint=hint)
    if "refused" in answer:
        raise NotHeld(f"{engine.title} cannot load it: {answer['refused']}")
    return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


def last_lines(log: Path) -> str:
    """Return the last lines of a log file."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-TAIL:])


def read_written(answer: dict[str, Any]) -> list[Written]:
    """Return the continuations in a worker's answer."""
    return [Written(one["tokens"], [tuple(two) if two else None for two in one["rivals"]]) for one in answer["written"]]
