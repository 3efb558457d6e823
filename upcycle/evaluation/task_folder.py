"""Checks a folder of evaluation tasks, and writes them again for the harness, so that no task of a folder runs code.

In the harness' format (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md), a task can name Python
functions, metrics that are downloaded as code, datasets with a script, and tasks of the harness with other data, some of which
execute what the data say. The harness' own tasks may do so, but those of a folder may not. This module lists what is allowed, and
everything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import dump_yaml, read_yaml
from upcycle.registry import suggestion

# Builders of the datasets package that read plain data; a name with a slash is a hub dataset, which can have no script.
_FILE_TYPES = ("arrow", "csv", "json", "parquet", "text", "xml")
_QUESTION = ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "target_delimiter", "fewshot_delimiter")
_TASK_KEYS = (
    *_QUESTION,
    "include",
    "task",
    "task_alias",
    "tag",
    "group",
    "group_alias",
    "aggregate_metric_list",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "fewshot_config",
    "num_fewshot",
    "description",
    "output_type",
    "generation_kwargs",
    "repeats",
    "metric_list",
    "filter_list",
    "should_decontaminate",
    "doc_to_decontamination_query",
    "metadata",
)
_DATA_KEYS = (
    "data_files",
    "data_dir",
    "revision",
    "encoding",
    "field",
    "delimiter",
    "sep",
    "quotechar",
    "column_names",
    "header",
)
_FEWSHOT_KEYS = (*_QUESTION, "sampler", "split", "samples", "fewshot_indices")
# Arguments of transformers' generate() that are allowed; others could name a repository with code.
_GENERATION_KEYS = (
    "until",
    "max_gen_toks",
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
_INNER = {"dataset_kwargs": _DATA_KEYS, "fewshot_config": _FEWSHOT_KEYS, "generation_kwargs": _GENERATION_KEYS}
_RULE = "tasks of a folder run no code and name only tasks of their folder"


def checked_tasks(folder: Path, metrics: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """Return every task and group in ``folder``, merged with the files that it includes, and with absolute paths of its data.

    Args:
        folder: the folder, which is searched with all folders in it.
        metrics: the harness' own metrics, by name.

    Raises:
        UsageError: the folder holds no task, or a file is damaged or asks for something that is not allowed.
    """
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UsageError(f"{folder} holds no .yaml task", hint="--task-folder names a folder with .yaml tasks")
    merged = {path: _merged(path, metrics, ()) for path in files}
    tasks = {path: content for path, content in merged.items() if "task" in content or "group" in content}
    own = set(_names(tasks.values()))
    for path, content in tasks.items():
        for key in ("task", "group"):
            if key in content and not (isinstance(content[key], str) or (key == "task" and "group" in content)):
                raise UsageError(f"{path}: key '{key}' must be a name, got {content[key]!r}")
        _check_members(content, path, own, metrics)
    return {path: _with_places(content, folder) for path, content in tasks.items()}


def write_tasks(tasks: Mapping[Path, Mapping[str, Any]], folder: Path) -> None:
    """Write checked tasks into ``folder`` as plain data, so that the harness loads exactly what was checked."""
    for number, content in enumerate(tasks.values()):
        (folder / f"{number:06}.yaml").write_text(dump_yaml(dict(content)), encoding="utf-8")


def _merged(path: Path, metrics: Mapping[str, Any], including: tuple[Path, ...]) -> dict[str, Any]:
    """Return a file's keys over those of the files that it includes, as the harness merges them; all files are checked."""
    if (place := path.resolve()) in including:
        raise UsageError(f"{path} includes itself")
    content = read_yaml(path, error=UsageError)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a task: it holds no keys")
    _check(content, path, metrics)
    included = content.pop("include", [])
    found: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise UsageError(f"{path}: key 'include' must name files, got {name!r}")
        found |= _merged(path.parent / name, metrics, (*including, place))
    return found | content


def _check(content: Mapping[Any, Any], path: Path, metrics: Mapping[str, Any]) -> None:
    """Check one task, group or member of a group."""
    _check_keys(content, _TASK_KEYS, path)
    for key, allowed in _INNER.items():
        if content.get(key) is not None:
            if not isinstance(content[key], dict):
                raise UsageError(f"{path}: key '{key}' must hold keys, got {content[key]!r}")
            _check_keys(content[key], allowed, path, f"{key}.")
    source = content.get("dataset_path")
    if source is not None and not _is_plain_data(source):
        raise UsageError(
            f"{path}: key 'dataset_path': {source!r} is neither a type of data files nor a hub dataset (org/name)",
            hint=f"one of: {', '.join(_FILE_TYPES)}, with dataset_kwargs.data_files; or org/name",
        )
    for entry in _list(content.get("metric_list")):
        metric = entry.get("metric") if isinstance(entry, Mapping) else entry
        if not isinstance(metric, str) or metric not in metrics:
            raise UsageError(
                f"{path}: key 'metric_list': the harness has no metric {metric!r} (others are downloaded as code)",
                hint=f"one of: {', '.join(sorted(metrics))}",
            )
        if "hf_evaluate" in entry:
            raise UsageError(f"{path}: key 'metric_list.hf_evaluate' is not allowed: {_RULE}", hint="leave the key out")


def _check_keys(content: Mapping[Any, Any], allowed: tuple[str, ...], path: Path, inside: str = "") -> None:
    for key in content:
        if key not in allowed:
            raise UsageError(
                f"{path}: key '{inside}{key}' is not allowed: {_RULE}",
                hint=suggestion(str(key), list(allowed)) or "leave the key out, or use a task of the harness itself",
            )


def _check_members(content: Mapping[str, Any], path: Path, own: set[str], metrics: Mapping[str, Any]) -> None:
    """Check that the members of a group are names of this folder, or whole tasks and groups."""
    if "group" not in content:
        return
    for member in _list(content.get("task")):
        if isinstance(member, Mapping):
            _check(member, path, metrics)
            if "include" in member:
                raise UsageError(f"{path}: key 'include' belongs to a file, not to a member of a group")
            _check_members(member, path, own, metrics)
            whole = "dataset_path" in member or ("group" in member and "task" in member)
            name = member.get("group") or member.get("task")
        else:
            whole, name = False, member
        if not isinstance(name, str) or not (whole or name in own):
            raise UsageError(
                f"{path}: group '{content['group']}' names {name!r}, which is not a task of this folder: {_RULE}",
                hint=f"name tasks of the harness on the command line: --tasks {content['group']},{name}",
            )


def _names(contents: Any) -> Iterator[str]:
    """Yield the names of tasks, groups and tags that files define."""
    for content in contents:
        for key in ("group", "task", "tag"):
            for name in _list(content.get(key)) if key == "tag" else [content.get(key)]:
                if isinstance(name, str) and not (key == "task" and "group" in content):
                    yield name


def _is_plain_data(source: Any) -> bool:
    if not isinstance(source, str):
        return False
    parts = source.split("/")
    return source in _FILE_TYPES or (len(parts) == 2 and all(part.strip(".~") for part in parts))


def _with_places(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a task whose data files have absolute paths instead of paths relative to the folder."""
    content = dict(content)
    data = content.get("dataset_kwargs")
    if content.get("dataset_path") in _FILE_TYPES and isinstance(data, dict):
        placed = {key: _placed(data[key], folder) for key in ("data_files", "data_dir") if key in data}
        content["dataset_kwargs"] = data | placed
    if "group" in content and isinstance(content.get("task"), list):
        content["task"] = [_with_places(each, folder) if isinstance(each, dict) else each for each in content["task"]]
    return content


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value if "://" in value else str(folder / value)
    if isinstance(value, list):
        return [_placed(each, folder) for each in value]
    return {key: _placed(each, folder) for key, each in value.items()} if isinstance(value, dict) else value


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
