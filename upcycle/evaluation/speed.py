"""Measures prefill, decoding and memory of two models in turns, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from upcycle import errors
from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.evaluation.timed_dtype import AUTO, timed_dtype
from upcycle.files.formats.parsing import parse_json, read_json
from upcycle.files.formats.tensor_files import read_config
from upcycle.files.locate import locate
from upcycle.hardware.child_processes import run_module, safe_environment
from upcycle.progress import SILENT, Progress
from upcycle.text.reading.plain_text import DEMO_TEXTS, read_text
from upcycle.text.windows import encode

PROMPT, GENERATE, ROUNDS = 256, 32, 5


@dataclass(frozen=True)
class ModelSpeed:
    """Holds medians over the rounds, with one sequence at a time.

    ``peak_memory_bytes`` is the process's on a CPU (including Python, libraries and mapped weight files), and torch's allocations
    on a GPU. ``experts`` is transformers' implementation of experts, None for a dense model.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    experts: str | None


@dataclass(frozen=True)
class KernelSpeed:
    """Holds the medians of the same model on upcycle's kernels, and the ratios to the reference, if there is one.

    ``experts`` says what ran: ``upcycle, whole blocks``, or ``upcycle`` for the experts alone.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    experts: str
    prefill_ratio: float | None = None
    decode_ratio: float | None = None


@dataclass(frozen=True)
class Speed:
    """Holds the speeds of both models, and the ratios model / reference.

    ``kernels`` is the model on upcycle's kernels; None for a dense model, and for a MoE that they do not know.

    ``instructions`` are those that torch uses, where the device is a CPU: ``AVX2``, ``AVX512``, ``DEFAULT``.
    """

    device: str
    instructions: str | None
    dtype: str
    threads: int
    prompt_tokens: int
    generated_tokens: int
    rounds: int
    model: ModelSpeed
    reference_name: str | None = None
    reference: ModelSpeed | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    memory_ratio: float | None = None
    kernels: KernelSpeed | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def measure_speed(
    model: str,
    reference: str | None = None,
    *,
    prompt: int = PROMPT,
    generate: int = GENERATE,
    rounds: int = ROUNDS,
    dtype: str = AUTO,
    progress: Progress = SILENT,
) -> Speed:
    """Time both models on the same prompt, round by round in turns, so that whatever slows the machine slows both.

    Args:
        model: folder, hub id, ``.gguf`` file or ``demo``.
        reference: another model, or None.
        prompt: tokens of the prompt, fewer where the context is shorter.
        generate: tokens to decode.
        rounds: how often each model is timed, after a first pass that is not.
        dtype: of both; ``auto``: the one that ``model`` is stored in, but fp32 on a CPU that does not multiply it natively.
        progress: receives the progress.

    Raises:
        UsageError: a model cannot be loaded, its context is too short, or it is a file, and ``dtype`` is not fp32.
        EnvironmentFault: the models do not fit into memory together.
    """
    names = [model, *([reference] if reference else [])]
    computed = timed_dtype(dtype, _config(names), "cuda" if torch.cuda.is_available() else "cpu")
    files = [name for name in names if not locate(name).path.is_dir()]
    if files and computed != torch.float32:
        raise UsageError(f"--dtype {dtype}: {files[0]} is a file, which is read in float32", hint="leave --dtype out")
    prompts = [_prompt(name, prompt, generate) for name in names]
    length = min(map(len, prompts))
    with progress.phase("loading models", len(names)), _workers(names) as workers:
        about = []
        for worker, ids in zip(workers, prompts, strict=True):
            about.append(worker.start(ids[:length], generate, str(computed).removeprefix("torch.")))
            progress.advance()
        found: list[list[dict[str, float]]] = [[] for _ in workers]
        on_kernels: list[dict[str, Any]] = []
        sparse = about[0]["experts"] is not None
        for index in range(rounds):
            turns = range(len(workers)) if index % 2 == 0 else reversed(range(len(workers)))
            for turn in turns:
                found[turn].append(workers[turn].run())
            if sparse:
                on_kernels.append(workers[0].run_on_kernels())
                sparse = "prefill" in on_kernels[-1]
    timed = [_summary(runs, length, generate, facts["experts"]) for runs, facts in zip(found, about, strict=True)]
    where = about[0]
    shared = Speed(
        where["device"], where["instructions"], where["dtype"], where["threads"], length, generate, rounds, timed[0]
    )
    if sparse:
        fast = _summary(on_kernels, length, generate, on_kernels[0]["experts"])
        prefill, decode = fast.prefill_tokens_per_second, fast.decode_tokens_per_second
        kernels = KernelSpeed(prefill, decode, on_kernels[0]["experts"])
        if reference:
            prefill, decode = (
                prefill / timed[1].prefill_tokens_per_second,
                decode / timed[1].decode_tokens_per_second,
            )
            kernels = replace(kernels, prefill_ratio=prefill, decode_ratio=decode)
        shared = replace(shared, kernels=kernels)
    if not reference:
        return shared
    first, second = timed
    return replace(
        shared,
        reference_name=reference,
        reference=second,
        prefill_ratio=first.prefill_tokens_per_second / second.prefill_tokens_per_second,
        decode_ratio=first.decode_tokens_per_second / second.decode_tokens_per_second,
        memory_ratio=first.peak_memory_bytes / second.peak_memory_bytes,
    )


def _config(names: Sequence[str]) -> dict[str, Any]:
    """Return the ``config.json`` of the first model; nothing if one of them is a file, which is read in fp32."""
    paths = [locate(name).path for name in names]
    return read_config(paths[0]) if all(path.is_dir() for path in paths) else {}


def _prompt(name: str, wanted: int, generate: int) -> list[int]:
    path = locate(name).path
    ids: list[int] = encode(load_tokenizer(path), read_text(next(iter(DEMO_TEXTS)))).tolist()
    context = read_json(path / "config.json").get("max_position_embeddings") if path.is_dir() else None
    length = min(wanted, (context or wanted + generate) - generate)
    if length < 1:
        raise UsageError(f"{name} has a context of {context} tokens: too short to write {generate}")
    return (ids * -(-length // len(ids)))[:length]


def _summary(runs: Sequence[dict[str, float]], prompt: int, generate: int, experts: str | None) -> ModelSpeed:
    return ModelSpeed(
        prefill_tokens_per_second=prompt / median(run["prefill"] for run in runs),
        decode_tokens_per_second=generate / median(run["decode"] for run in runs),
        peak_memory_bytes=int(max(run["peak"] for run in runs)),
        experts=experts,
    )


class _Worker:
    """Runs one model in a process of its own, and asks it for times."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            run_module("upcycle.evaluation.speed_worker"),
            env=safe_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, prompt: list[int], generate: int, dtype: str) -> dict[str, Any]:
        """Load the model, and return what its numbers depend on."""
        return self._ask({"name": self.name, "prompt": prompt, "generate": generate, "dtype": dtype})

    def run(self) -> dict[str, float]:
        """Time one round, and return its seconds and peak memory."""
        return self._ask({})

    def run_on_kernels(self) -> dict[str, Any]:
        """Time one round on upcycle's kernels; without seconds where they do not know the model."""
        return self._ask({"kernels": True})

    def _ask(self, content: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EnvironmentFault(
                f"the process that ran {self.name} ended (code {self.process.wait()})",
                hint="it may have run out of memory: both models must fit together",
            )
        found: dict[str, Any] = parse_json(line, "the worker's answer", nan=True)
        if "error" in found:
            raise getattr(errors, found["error"])(found["message"], hint=found["hint"])
        return found


@contextmanager
def _workers(names: Sequence[str]) -> Iterator[list[_Worker]]:
    workers: list[_Worker] = []
    try:
        workers += [_Worker(name) for name in names]
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.communicate()
