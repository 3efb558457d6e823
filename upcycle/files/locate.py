"""Finds the source that the user named: a folder, a ``.gguf`` file, a hub id or the embedded demo model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.user_paths import user_path

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# Everything but code and weights in other formats. The model card is needed for the licence.
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "README.md")


@dataclass(frozen=True)
class Source:
    """Holds where a source is on this machine: ``path`` is a folder or a ``.gguf`` file.

    ``adapter`` is the LoRA folder that is added to its weights while they are read, if any.
    """

    name: str  # as the user wrote it
    path: Path
    revision: str | None = None  # resolved commit of a hub id
    adapter: Path | None = None


def is_local(name: str) -> bool:
    """Return whether ``name`` needs no download."""
    return name == "demo" or user_path(name).exists()


def locate(
    name: str, revision: str | None = None, config_only: bool = False, wanted: tuple[str, ...] = _WANTED
) -> Source:
    """Find the source called ``name``, and download it from the hub when it is not local.

    Args:
        name: a folder, a ``.gguf`` file, a hub id, or ``demo``.
        revision: branch, tag or commit of a hub id; default: the main branch.
        config_only: download only ``config.json``.
        wanted: patterns of the files to download otherwise.

    Raises:
        UsageError: there is no such folder, file, repository or revision.
        EnvironmentFault: the hub cannot be reached.
    """
    if name == "demo":
        return Source("demo", DEMO_FOLDER / "model")
    path = user_path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        if revision:
            raise UsageError(f"--revision only applies to a hub id, and {name} is local")
        return Source(name, path)
    if path.is_file():
        raise UsageError(
            f"{name} is a file, but not a .gguf file", hint="name the folder that holds config.json and the weights"
        )
    if not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".yaml", ".yml")):
        raise UsageError(
            f"no such file or folder: {name}",
            hint="an adapter is merged first: upcycle merge ADAPTER OUT --base MODEL"
            if "+" in name
            else "a source is a local folder, a .gguf file, a hub id (org/name), or demo",
        )
    return _from_hub(name, revision, ("config.json",) if config_only else wanted)


def _from_hub(name: str, revision: str | None, wanted: tuple[str, ...]) -> Source:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except GatedRepoError:
        raise UsageError(
            f"{name} on the hub asks you to accept its licence first",
            hint=f"accept it on the page of {name}, then run: hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise UsageError(
            f"{name} on the hub has no revision '{revision}'", hint="leave --revision out for the main branch"
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"no folder and no hub repository is called {name}",
            hint="check the spelling; for a private repository run: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE")
        why = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else "the hub cannot be reached"
        raise EnvironmentFault(
            f"cannot download {name}: {why}",
            hint=f"download it on a machine with network access (hf download {name}), then name the folder; "
            "beside a recipe: --source FOLDER",
        ) from None
    return Source(name, folder, revision=folder.name)
