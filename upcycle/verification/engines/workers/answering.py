"""One question on standard input, one answer on standard output, and an end with whoever asked. Only the standard library."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

PARENT = "UPCYCLE_PARENT"


class Refused(Exception):  # noqa: N818 - it is an answer
    """The model cannot be loaded."""


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> NoReturn:
    """Answer with what ``answer`` returns; ``missing`` if the engine cannot be imported, ``refused`` if it cannot load the model."""
    asking = int(os.environ.get(PARENT, os.getppid()))
    threading.Thread(target=_end_with, args=(asking,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    asked = json.load(sys.stdin)
    try:
        found = answer(asked)
    except ImportError as error:
        found = {"missing": str(error)}
    except Refused as refusal:
        found = {"refused": str(refusal)}
    json.dump(found, answers)
    answers.flush()
    os._exit(0)  # an engine's threads have nothing left to do


def _end_with(asking: int) -> None:
    # A signal that ends the process that asked does not reach this one, and a model is too large to be forgotten in memory.
    parent = os.getppid()  # another one where a script of the user's starts the engine's Python
    while os.getppid() == parent and _alive(asking):
        time.sleep(0.5)
    os._exit(1)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
