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
from upcycle.evaluation.task_folder import checked_tasks, write_tasks
from upcycle.files.output.scratch import scratch

MISSING_EXTRA = "pip install 'upcycle[tasks]'"


@contextmanager
def guarded() -> Iterator[None]:
    """While it lasts the harness runs templates of tasks in a sandbox, loads no metric from the hub and prints nothing.

    Raises:
        EnvironmentFault: the extra ``tasks`` is not installed.
    """
    if find_spec("lm_eval") is None:
        raise EnvironmentFault("tasks need lm-eval, which is not installed", hint=MISSING_EXTRA)
    import datasets
    import evaluate as hub_metrics
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import evaluator, utils

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        raise UsageError(f"the metric '{name}' is code from the hub, which is not run")

    sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    logger, sink = logging.getLogger("lm_eval"), io.StringIO()
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(patch.object(utils, "env", sandbox))
        stack.enter_context(patch.object(hub_metrics, "load", refuse))
        # It would tell a server which data sets are opened, files of one's own included.
        stack.enter_context(patch.object(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False))
        # What it finds out of the machine and of git is not used here, and git complains on the terminal.
        for name in ("add_env_info", "get_git_commit_hash"):
            stack.enter_context(patch.object(evaluator, name, lambda *_: None, create=True))
        # Its own processes for standard errors gain nothing at the sizes drawn here.
        stack.enter_context(patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        stack.enter_context(redirect_stdout(sink))
        stack.enter_context(redirect_stderr(sink))
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.CRITICAL)
        yield


def load_tasks(names: Sequence[str], folder: Path | None) -> list[tuple[Any, Any]]:
    """The tasks and groups of these names with their data, each with the harness' list that it is from; within :func:`guarded`.

    Args:
        names: of tasks, groups or tags; ``*`` stands for anything.
        folder: tasks of the user's own. A name is looked for there first, and among the harness' own tasks only where the folder
            has none: the two never meet in one list, so that neither reaches into the other.

    Raises:
        UsageError: there is no such task, a file of ``folder`` cannot be used, or a task is faulty.
        EnvironmentFault: its data cannot be read or downloaded.
    """
    from lm_eval.api.registry import get_metric, metric_registry
    from lm_eval.tasks import TaskManager

    with scratch("tasks") as copies:
        managers: list[Any] = []
        if folder:
            get_metric("acc")  # fills the registry
            write_tasks(checked_tasks(folder, metric_registry), copies)
            managers.append(TaskManager(include_path=str(copies), include_defaults=False))
        found: dict[str, Any] = {}
        for name in names:
            matching = managers[0].match_tasks([name]) if folder else []
            manager = managers[0] if matching else None
            if not matching:
                if len(managers) == bool(folder):
                    managers.append(TaskManager())  # reading its thousands of files takes seconds
                manager = managers[-1]
                matching = manager.match_tasks([name])
            if not matching:
                raise _unknown(name, [each for manager in managers for each in manager.all_tasks], folder)
            found = dict.fromkeys(matching, manager) | found
        loaded: list[tuple[Any, Any]] = []
        for name, manager in found.items():
            with explained(f"the task '{name}' cannot be loaded", name):
                tasks = manager.load([name])
            groups = [group for group in tasks.get("groups", {}).values() if group.name == name]
            loaded += [(manager, task) for task in groups or tasks["tasks"].values()]
    return loaded


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> UsageError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "--task-folder DIR names a folder with tasks of yours"
    return UsageError(f"there is no task '{name}' in lm-eval{f' or {folder}' if folder else ''}", hint=hint)


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
