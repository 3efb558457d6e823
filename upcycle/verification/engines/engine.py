"""What an inference engine is to this tool: a program that is given token ids and answers with those it writes greedily.

Every engine runs in a process of its own, with a Python of its own if need be: engines pin other versions of torch and
transformers than this tool does, and what they leave in memory or on a GPU ends with them. The scripts in ``workers/``
import nothing of upcycle, and speak JSON.
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
    """The engine cannot hold this model: the message says why."""


@dataclass(frozen=True)
class Asked:
    """What an engine is asked: to go on from ``prompts`` (token ids) by ``tokens`` tokens each, and to tokenize ``texts``."""

    prompts: list[list[int]]
    tokens: int
    texts: list[str]

    @property
    def context(self) -> int:
        """Positions that the longest prompt needs."""
        return max(map(len, self.prompts)) + self.tokens


@dataclass(frozen=True)
class Written:
    """What an engine wrote after one prompt: token ids, and at each the two most probable ones and how far their logits are apart
    (None where it does not say).
    """

    tokens: list[int]
    rivals: list[tuple[int, int, float] | None]


@dataclass(frozen=True)
class Answer:
    """What an engine said. ``tokenized`` is None where it tokenizes with transformers' own tokenizer."""

    version: str
    dtype: str
    written: list[Written]
    tokenized: list[list[int]] | None


class Engine(Protocol):
    """One inference engine.

    ``name`` is that of ``--with``; ``reads`` says whose tokenizer it uses.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def ask(self, model: Path, config: dict[str, Any], asked: Asked, work: Path, python: str) -> Answer:
        """Run the model.

        Args:
            model: a stock transformers folder.
            config: its ``config.json``.
            asked: what to write.
            work: an empty folder for what is only needed meanwhile.
            python: the interpreter that has the engine.

        Raises:
            EnvironmentFault: the engine is not there, or its process died.
            NotHeld: it cannot hold the model.
        """

    def known_difference(self, config: dict[str, Any]) -> str | None:
        """Why it is known to compute something else than transformers, if it is."""


def run_worker(
    engine: Engine, script: str, question: dict[str, Any], work: Path, python: str, hint: str, **environment: str
) -> dict[str, Any]:
    """Run a worker script with one JSON document on its standard input; its answer is one on its standard output.

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
            hint="perhaps for lack of memory; its last words are above",
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
    """The end of what a process wrote."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-TAIL:])


def read_written(answer: dict[str, Any]) -> list[Written]:
    """The texts of a worker's answer."""
    return [Written(one["tokens"], [tuple(two) if two else None for two in one["rivals"]]) for one in answer["written"]]
