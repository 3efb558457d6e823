"""Commands and environments for child Python processes, which never import anything from the working directory.

``python -m`` and ``python -c`` look for modules in the working directory first, so a ``deepspeed.py`` in a downloaded folder would
be run. From Python 3.11 on, ``-P`` prevents that, and ``PYTHONSAFEPATH`` prevents it in whatever these processes start. Python 3.10
has neither: there the first statement takes the working directory off ``sys.path``, before anything else is imported; what such a
process starts itself is out of reach.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SAFE_PATH_VARIABLE = "PYTHONSAFEPATH"
# sys is part of the interpreter: importing it looks into no folder.
_CLEAN = "import sys; sys.path[:] = [place for place in sys.path if place]; import runpy; "


def run_module(module: str) -> list[str]:
    """The command that runs a module of this installation with the running Python."""
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", f"{_CLEAN}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


def run_script(script: Path, python: str) -> list[str]:
    """The command that runs a script with another Python; modules beside the script are found last."""
    code = f"{_CLEAN}sys.path.append({str(script.parent)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    return [python, "-c", code]


def engine_environment() -> dict[str, str]:
    """The environment for another project's program, without ``PYTHONSAFEPATH``: it may be a script that needs modules beside it.

    Start it with :func:`run_script`, or in an empty folder.
    """
    return {key: value for key, value in os.environ.items() if key != SAFE_PATH_VARIABLE}


def safe_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """``environment`` (by default this process') with ``PYTHONSAFEPATH`` set."""
    return {**(os.environ if environment is None else environment), SAFE_PATH_VARIABLE: "1"}
