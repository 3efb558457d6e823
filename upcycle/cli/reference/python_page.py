"""The page of the public Python functions, made from their signatures and docstrings."""

from __future__ import annotations

import inspect
from typing import Any

import upcycle
from upcycle.cli.reference.docstrings import as_markdown


def python_page() -> str:
    """Return the page of everything in ``upcycle.__all__``."""
    parts = [
        "# Python",
        "Everything that `import upcycle` offers. [From Python](../guides/python.md) shows it in use. Failures are subclasses of "
        "`upcycle.errors.UpcycleError`, with a `message`, a `hint` and the command's `exit_code` ([exit codes](exit_codes.md)); what "
        "is returned has `as_dict()`, whose keys are [those of `--json`](json.md).",
    ]
    parts += [_section(name, getattr(upcycle, name)) for name in upcycle.__all__]
    return "\n\n".join(parts)


def _section(name: str, function: Any) -> str:
    if function.__name__ != name:
        return f"## upcycle.{name}\n\nAnother name of `upcycle.{function.__name__}`."
    parameters = inspect.signature(function).parameters.values()
    written = [_parameter(each) for each in parameters]
    first = next((i for i, each in enumerate(parameters) if each.kind is inspect.Parameter.KEYWORD_ONLY), None)
    if first is not None:
        written.insert(first, "*")
    return f"## upcycle.{name}\n\n`upcycle.{name}({', '.join(written)})`\n\n{as_markdown(function.__doc__)}"


def _parameter(parameter: inspect.Parameter) -> str:
    """Return a parameter as a signature shows it, without its type; a default that is an object is ``...``."""
    default = parameter.default
    if default is not inspect.Parameter.empty and not isinstance(default, (str, int, float, tuple, type(None))):
        return f"{parameter.name}=..."
    return str(parameter.replace(annotation=inspect.Parameter.empty))
