"""Tiny training runs for tests: recipes on pico models and short made-up texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from upcycle.trainers.recipe.training_recipe import TrainRecipe, parse_train_recipe
from upcycle.trainers.run.loop import TrainResult, train
from upcycle.trainers.run.step_reports import read_log

COMMAND = [sys.executable, "-P", "-m", "upcycle.cli.main", "train"]
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "that",
    "it",
    "was",
    "all",
    "red",
    "so",
    "he",
    "went",
    "home",
)


def write_text(path: Path, documents: int = 60, shift: int = 0) -> str:
    """Short documents that a model can learn something from."""
    lines = []
    for number in range(documents):
        start = (number * 5 + shift) % len(WORDS)
        text = " ".join(WORDS[(start + word) % len(WORDS)] for word in range(10 + number % 17))
        lines.append(json.dumps({"text": text}) + "\n")
    path.write_text("".join(lines))
    return str(path)


def recipe_for(model: Path, folder: Path, **changes: Any) -> TrainRecipe:
    """A run of six steps into ``folder / "run"``; dotted keys of ``changes`` go deeper with ``__``."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.jsonl"
    if not text.exists():
        write_text(text)
    content: dict[str, Any] = {
        "model": str(model),
        "output": str(folder / "run"),
        "data": {
            "domains": {"cats": str(text)},
            "shuffle": "4KB",
            "cache": str(folder / "cache"),
            "validation": {"fraction": 0.1, "tokens": 128, "batch": 2},
        },
        "length": 32,
        "global_batch": 4,
        "micro_batch": 2,
        "stages": [
            {"name": "heal", "steps": 6, "learning_rate": 0.01, "losses": {"switch_balance": {}, "router_z": {}}}
        ],
        "saving": {"every": 2, "export": False},
        "log": {"peak_tflops": 0.05},
    }
    stage = changes.pop("stage", {})
    content["stages"][0] |= stage
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = {**content[key], **value}
        else:
            content[key] = value
    return parse_train_recipe(content, "test")


def run(recipe: TrainRecipe, **options: Any) -> tuple[TrainResult, list[str]]:
    """The run and what it said."""
    said: list[str] = []
    return train(recipe, said.append, **options), said


def steps(recipe: TrainRecipe) -> list[dict[str, Any]]:
    """The steps that a run logged, without what depends on the clock."""
    lines = [line for line in read_log(Path(recipe.output) / "log.jsonl") if line["kind"] == "step"]
    timed = ("tokens_per_second", "utilisation", "memory")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def losses(recipe: TrainRecipe) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in steps(recipe)]


def two_ranks(recipe: TrainRecipe, folder: Path, **changes: Any) -> TrainRecipe:
    """The same run with ``--nproc 2`` and nothing else: as large micro-batches, half as many passes."""
    folder.mkdir(exist_ok=True)
    content = {**recipe.model_dump(mode="json"), **changes, "output": str(folder / "run")}
    return TrainRecipe.model_validate(content)


def start(recipe: TrainRecipe, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    path = Path(recipe.output).with_suffix(".yaml")
    path.write_text(recipe.dump())
    return subprocess.Popen(
        [*COMMAND, str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for it, and its output."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors[-3000:]
    return output


def on_ranks(recipe: TrainRecipe, ranks: int) -> str:
    """The run as so many processes."""
    return finish(start(recipe, "--nproc", str(ranks)))
