"""Streams the rows of a hub dataset, without downloading all of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from upcycle.errors import EnvironmentFault
from upcycle.files.user_paths import user_path
from upcycle.text.reading.plain_text import DEMO_TEXTS

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")


def is_dataset(name: str) -> bool:
    """Return whether a name can be that of a hub dataset (``org/name[:config[:split]]``) and is not that of a file."""
    path = user_path(name)
    if name == "demo" or name in DEMO_TEXTS or path.exists() or path.suffix or path.is_absolute():
        return False
    return bool(_NAME.fullmatch(name))


def hub_rows(name: str, revision: str | None = None, skip: int = 0) -> Iterator[Any]:
    """Yield the rows of ``org/name[:config[:split]]`` in order, without the first ``skip``.

    Raises:
        EnvironmentFault: the datasets package is missing, or the dataset cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(
            f"there is no file {name}, and hub datasets need the datasets package", hint="pip install 'upcycle[train]'"
        ) from None
    repository, config, split = [*name.split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(
            repository, config or None, split=split or "train", streaming=True, revision=revision
        )
        yield from rows.skip(skip) if skip else rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise EnvironmentFault(f"the dataset {name} cannot be read: {str(error).splitlines()[0]}") from None
