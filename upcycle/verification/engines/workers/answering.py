"""Reads a question from standard input, answers on standard output, and ends when the process that asked has ended.

It uses only the standard library.
"""

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
    os.dup2(2, 1)  # keeps what libraries print out of the answer
    asked = json.load(sys.stdin)
    try:
        found = answer(asked)
    except ImportError as error:
        found = {"missing": str(error)}
    except Refused as refusal:
        found = {"refused": str(refusal)}
    json.dump(found, answers)
    answers.flush()
    os._exit(0)  # does not wait for the engine's threads


def _end_with(asking: int) -> None:
    # A signal that ends the process that asked does not reach this one, which would keep a large model in memory.
    parent = os.getppid()  # not the process that asked, if the user's script starts the engine's Python
    while os.getppid() == parent and _alive(asking):
        time.sleep(0.5)
    os._exit(1)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
