"""The evaluation harness (https://github.com/EleutherAI/lm-evaluation-harness, extra ``tasks``), kept from running code of tasks."""

from __future__ import annotations

import difflib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.task_folder import check_task_folder

MISSING_EXTRA = "pip install 'upcycle[tasks]'"


@contextmanager
def guarded(folder: Path | None) -> Iterator[None]:
    """While it lasts the harness runs templates of tasks in a sandbox, loads no metric from the hub and prints nothing.

    Relative data files of tasks are looked for in ``folder``, whatever the working directory is.

    Raises:
        UsageError: there is no such folder.
        EnvironmentFault: the extra ``tasks`` is not installed.
    """
    if folder and not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="--task-folder names a folder with .yaml tasks")
    if find_spec("lm_eval") is None:
        raise EnvironmentFault("tasks need lm-eval, which is not installed", hint=MISSING_EXTRA)
    import evaluate as hub_metrics
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import evaluator, utils

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        raise UsageError(f"the metric '{name}' is code from the hub, which is not run")

    sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    logger, sink = logging.getLogger("lm_eval"), io.StringIO()
    level, before = logger.level, Path.cwd()
    with ExitStack() as stack:
        stack.enter_context(patch.object(utils, "env", sandbox))
        stack.enter_context(patch.object(hub_metrics, "load", refuse))
        # What it finds out of the machine and of git is not used here, and git complains on the terminal.
        for name in ("add_env_info", "get_git_commit_hash"):
            stack.enter_context(patch.object(evaluator, name, lambda *_: None, create=True))
        # Its own processes for standard errors gain nothing at the sizes drawn here.
        stack.enter_context(patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        stack.enter_context(redirect_stdout(sink))
        stack.enter_context(redirect_stderr(sink))
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.CRITICAL)
        stack.callback(os.chdir, before)
        os.chdir(folder or before)
        yield


def load_tasks(names: Sequence[str], folder: Path | None) -> tuple[Any, list[Any]]:
    """The harness' list of tasks, and the tasks and groups of these names with their data; for use within :func:`guarded`.

    Args:
        names: of tasks, groups or tags; ``*`` stands for anything.
        folder: tasks beside the harness' own; a task of the same name replaces that.

    Raises:
        UsageError: there is no such task, a file of ``folder`` cannot be used, or a task is faulty.
        EnvironmentFault: its data cannot be read or downloaded.
    """
    import lm_eval
    from lm_eval.api.registry import get_metric, metric_registry

    if folder:
        get_metric("acc")  # fills the registry
        check_task_folder(folder, Path(lm_eval.__file__).parent, metric_registry)
    manager = _manager(names, folder)
    found: list[str] = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            where = f" in lm-eval or {folder}" if folder else " in lm-eval"
            raise UsageError(
                f"there is no task '{name}'{where}",
                hint=f"did you mean {', '.join(near)}?"
                if near
                else "--task-folder DIR names a folder with tasks of yours",
            )
        found += [match for match in matching if match not in found]
    loaded: list[Any] = []
    for name in found:
        with explained(f"the task '{name}' cannot be loaded", name):
            tasks = manager.load([name])
        groups = list(tasks.get("groups", {}).values())
        loaded += [group for group in groups if group.name == name] or list(tasks["tasks"].values())
    return manager, loaded


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """Lists tasks. Reading the harness' own thousands takes seconds: where ``folder`` has all that is needed, it is enough."""
    from lm_eval.tasks import TaskManager

    if folder:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        groups = [(own.task_index[group].cfg or {}).get("task") for group in own.all_groups]
        members = [member for group in groups for member in (group if isinstance(group, list) else [group])]
        if all(own.match_tasks([name]) for name in names) and all(member in own.all_tasks for member in members):
            return own
    return TaskManager(include_path=str(folder) if folder else None)


@contextmanager
def explained(what: str, task: str) -> Iterator[None]:
    """Turn whatever the harness and its data sets raise into an error of ours.

    Raises:
        EnvironmentFault: a file or the network.
        UsageError: everything else, as the task says it.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UpcycleError:
        raise
    except (OSError, DatasetsError) as error:
        raise EnvironmentFault(
            f"{what}: {_first_line(error)}",
            hint="data sets of lm-eval are downloaded once and kept in HF_HOME; --task-folder DIR takes tasks with data in "
            "local files",
        ) from None
    except Exception as error:  # whatever a task's templates and metrics can raise
        raise UsageError(
            f"{what}: {type(error).__name__}: {_first_line(error)}", hint=f"see the file of '{task}'"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
