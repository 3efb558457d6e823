"""A folder of evaluation tasks, checked before anything reads it: a task says what is asked and how it is scored, and runs no code.

The harness' format (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md) lets a task name Python
functions, metrics that are downloaded as code, and data sets that come with a script. Its own package may do so; a folder may not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError
from upcycle.parsing import read_yaml

# Keys whose value would be run: a Python class, code that a model wrote, the script of a data set, templates of another package.
_RUNS = ("class", "unsafe_code", "trust_remote_code", "use_prompt", "hf_evaluate")


def check_task_folder(folder: Path, trusted: Path, metrics: Mapping[str, Any]) -> None:
    """Read every task in ``folder``, and all that they include.

    Args:
        folder: where tasks are looked for, as deep as it goes.
        trusted: the harness' own package, files of which may be included whatever they hold.
        metrics: names of the harness' own metrics.

    Raises:
        UsageError: it holds no task, or a file is damaged or asks for code to be run.
    """
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UsageError(f"{folder} holds no .yaml task", hint="--task-folder names a folder with .yaml tasks")
    seen: set[Path] = set()
    while files:
        path = files.pop().resolve()
        if path in seen or path.is_relative_to(trusted.resolve()):
            continue
        seen.add(path)
        content = _read(path)
        _check(content, path, metrics)
        included = content.get("include", [])
        files += [path.parent / name for name in (included if isinstance(included, list) else [included])]


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, error=UsageError)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no task: it holds no keys")
    return content


def _check(content: Mapping[str, Any], path: Path, metrics: Mapping[str, Any]) -> None:
    for key, value in _entries(content):
        if key in _RUNS and value not in (None, False):
            raise UsageError(
                f"{path}: key '{key}' runs code, and tasks of a folder are not run as code",
                hint="leave the key out, or use a task of the harness itself",
            )
        if key == "dataset_path" and value == "pandas":  # refused by datasets itself from version 5 on
            raise UsageError(
                f"{path}: key 'dataset_path': 'pandas' reads pickles, and those run code",
                hint="give the data as json, csv, parquet or text",
            )
        if key == "metric" and value not in metrics:
            raise UsageError(
                f"{path}: key 'metric_list': the harness has no metric '{value}' (others are downloaded as code)",
                hint=f"one of: {', '.join(sorted(metrics))}",
            )


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield str(key), value
            yield from _entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value)
