"""Scores models on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.evaluation.lm_eval_harness import explained_harness_errors, guarded, load_tasks
from upcycle.files.locate import locate
from upcycle.files.user_paths import user_path
from upcycle.models.load import load_model
from upcycle.progress import SILENT, Progress

_RESAMPLES = 1000  # bootstrap samples, for standard errors without a closed form
_STDERR = "_stderr"


@dataclass(frozen=True)
class TaskScore:
    """Holds one metric of one task over ``samples`` questions.

    ``filter`` is what the harness did to the answers before scoring (often ``none``); ``stderr`` is the standard error of the mean
    over questions; ``difference`` is the model's value minus the reference's.
    """

    task: str
    metric: str
    filter: str
    samples: int
    value: float
    stderr: float | None
    higher_is_better: bool | None
    reference: float | None = None
    reference_stderr: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class TaskScores:
    """Holds all scores of one run; ``limit`` is the largest number of questions per task."""

    harness: str
    reference: str | None
    limit: int | None
    scores: list[TaskScore]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def score_tasks(
    model: str,
    reference: str | None,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress = SILENT,
) -> TaskScores:
    """Score both models in fp32, one after the other.

    Args:
        model: folder, hub id, ``.gguf`` file or ``demo``.
        reference: another model, or None.
        names: tasks, groups or tags of the harness; ``*`` matches anything.
        folder: folder with the user's tasks.
        limit: only the first questions of each task.
        batch: sequences per forward pass.
        progress: receives the progress.

    Raises:
        UsageError: a task is unknown or faulty, or would run code.
        EnvironmentFault: the harness or the data of a task is missing, or a model does not fit into memory.
    """
    folder = user_path(folder).absolute() if folder else None
    paths = [str(locate(name).path.absolute()) if name != "demo" else name for name in (model, reference) if name]
    if folder and not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="--task-folder names a folder with .yaml tasks")
    with progress.phase("loading tasks", 1), guarded():
        import lm_eval

        tasks = load_tasks(names, folder)
        progress.advance()

    def ask(model: Any, manager: Any, task: Any) -> Any:
        return lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=_RESAMPLES,
        )

    found = [_scores_of(path, tasks, ask, batch, progress) for path in paths]
    compared = found[0]
    if reference:
        beside = {(score.task, score.metric, score.filter): score for score in found[1]}
        compared = [_compared(score, beside.get((score.task, score.metric, score.filter))) for score in found[0]]
    return TaskScores(f"lm-eval {version('lm-eval')}", reference, limit, compared)


def _compared(score: TaskScore, other: TaskScore | None) -> TaskScore:
    if other is None:  # the harness gave no such number for the reference
        return score
    return replace(score, reference=other.value, reference_stderr=other.stderr, difference=score.value - other.value)


def _scores_of(
    name: str,
    tasks: Sequence[tuple[Any, Any]],
    ask: Callable[[Any, Any, Any], dict[str, Any]],
    batch: int,
    progress: Progress,
) -> list[TaskScore]:
    with progress.phase("loading model", 1):
        model, tokenizer = load_model(name), load_tokenizer(locate(name).path)
        progress.advance()
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UsageError(
            f"the tokenizer of {name} has no token that begins or ends a text, but tasks need one",
            hint="set bos_token or eos_token in tokenizer_config.json",
        )
    scores: list[TaskScore] = []
    with progress.phase(f"asking {Path(name).name}", len(tasks)), guarded():
        from lm_eval.models.huggingface import HFLM

        adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        for manager, task in tasks:
            title = getattr(task, "name", None) or task.task_name
            with explained_harness_errors(f"the task '{title}' failed", title):
                scores += _read(ask(adapter, manager, task), progress)
            progress.advance()
    return scores


def _read(result: dict[str, Any], progress: Progress) -> list[TaskScore]:
    """Return the scores in the harness' result, whose keys are ``metric,filter`` and whose missing values are strings."""
    scores = []
    for task, values in result["results"].items():
        better = result["higher_is_better"].get(task) or {}
        for key, value in values.items():
            metric, comma, named = key.partition(",")
            if not comma or metric.endswith(_STDERR) or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                progress.note(f"{task}: {metric} is {value} and is left out")
                continue
            stderr = values.get(f"{metric}{_STDERR},{named}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    filter=named,
                    samples=_samples(result, task),
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
                    higher_is_better=better.get(metric),
                )
            )
    return scores


def _samples(result: dict[str, Any], task: str) -> int:
    """Return the number of questions of a task, or of all tasks in a group."""
    counts = result["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_samples(result, member) for member in result["group_subtasks"].get(task, []))
