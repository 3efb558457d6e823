"""Loads tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, extra ``tasks``) without their code."""

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

INSTALL_TASKS = "pip install 'upcycle[tasks]'"


@contextmanager
def guarded() -> Iterator[None]:
    """Make the harness, in the ``with`` block, run templates in a sandbox, load no metric from the hub and print nothing.

    Raises:
        EnvironmentFault: the extra ``tasks`` is not installed.
    """
    if find_spec("lm_eval") is None:
        raise EnvironmentFault("tasks need lm-eval, which is not installed", hint=INSTALL_TASKS)
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
        # Otherwise datasets tells a server which datasets are opened, even local files.
        stack.enter_context(patch.object(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False))
        # Facts about the machine and git are not used here, and git would print complaints on the terminal.
        for name in ("add_env_info", "get_git_commit_hash"):
            stack.enter_context(patch.object(evaluator, name, lambda *_: None, create=True))
        # Processes for computing standard errors are not worth starting at these sample sizes.
        stack.enter_context(patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))
        stack.enter_context(redirect_stdout(sink))
        stack.enter_context(redirect_stderr(sink))
        stack.callback(logger.setLevel, level)
        logger.setLevel(logging.CRITICAL)
        yield


def load_tasks(names: Sequence[str], folder: Path | None) -> list[tuple[Any, Any]]:
    """Return tasks and groups with their data, each with the harness' task manager that it comes from; call in :func:`guarded`.

    Args:
        names: names of tasks, groups or tags; ``*`` matches anything.
        folder: folder with the user's tasks. A name is first searched there, and only then among the harness' tasks. The two are
            kept in separate managers, so that neither can refer to the other.

    Raises:
        UsageError: there is no such task, a file in ``folder`` cannot be used, or a task is faulty.
        EnvironmentFault: a task's data cannot be read or downloaded.
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
            with explained_harness_errors(f"the task '{name}' cannot be loaded", name):
                tasks = manager.load([name])
            groups = [group for group in tasks.get("groups", {}).values() if group.name == name]
            loaded += [(manager, task) for task in groups or tasks["tasks"].values()]
    return loaded


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> UsageError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "for tasks of your own, use --task-folder DIR"
    return UsageError(f"there is no task '{name}' in lm-eval{f' or {folder}' if folder else ''}", hint=hint)


@contextmanager
def explained_harness_errors(what: str, task: str) -> Iterator[None]:
    """Turn what the harness and its datasets raise in the ``with`` block into upcycle's errors.

    Raises:
        EnvironmentFault: a file or the network failed.
        UsageError: anything else failed, in the words of the task.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UpcycleError:
        raise
    except (OSError, DatasetsError) as error:
        raise EnvironmentFault(
            f"{what}: {_first_line(error)}",
            hint="datasets of lm-eval are downloaded once and kept in HF_HOME; tasks in --task-folder DIR can have data in local "
            "files",
        ) from None
    except Exception as error:  # whatever a task's templates and metrics can raise
        raise UsageError(
            f"{what}: {type(error).__name__}: {_first_line(error)}", hint=f"see the file of '{task}'"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
