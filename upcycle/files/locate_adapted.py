"""Finds a source to which a LoRA folder is added: the folder itself, or ``MODEL+FOLDER`` as mergekit writes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import CONFIG
from upcycle.files.locate import Source, is_local, locate
from upcycle.files.user_paths import user_path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WANTED = (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "LICENSE*",
    "LICENCE*",
    "README.md",
)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a LoRA adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()


def model_and_adapter(name: str) -> tuple[str | None, str]:
    """Return the model and the adapter that ``MODEL+ADAPTER`` names; (None, ``name``) where it names one thing.

    Raises:
        UsageError: it names several adapters.
    """
    if "+" not in name or user_path(name).exists():
        return None, name
    model, _, adapter = name.partition("+")
    if "+" in adapter and not user_path(adapter).exists():
        raise UsageError(
            f"{name} adds several adapters", hint="merge one of them first: upcycle merge ADAPTER OUT --base MODEL"
        )
    if not model or not adapter:
        raise UsageError(f"{name}: a model and an adapter are named MODEL+ADAPTER", hint="remove the +")
    return model, adapter


def names_adapter(name: str) -> bool:
    """Return whether a source's name stands for a model with an adapter."""
    model, adapter = model_and_adapter(name)
    return model is not None or is_adapter(user_path(adapter))


def is_local_adapted(name: str) -> bool:
    """Return whether a source that may have an adapter needs no download."""
    model, adapter = model_and_adapter(name)
    if model is not None:
        return is_local(model) and user_path(adapter).exists()
    if not is_adapter(user_path(name)):
        return is_local(name)
    said = read_json(user_path(name) / ADAPTER_CONFIG).get("base_model_name_or_path")
    return isinstance(said, str) and is_local(said)


def locate_adapted(name: str, revision: str | None = None, config_only: bool = False) -> Source:
    """Find a source that may be a LoRA folder, or a model and one.

    Args:
        name: what :func:`upcycle.files.locate.locate` takes; a LoRA folder, whose own settings name its base; or
            ``MODEL+ADAPTER``, each of which is a folder or a hub id.
        revision: of the model, on the hub.
        config_only: of the model on the hub, download only ``config.json``.

    Raises:
        UsageError: something is not there, or the adapter does not say what it was trained on.
        EnvironmentFault: the hub cannot be reached.
    """
    model, adapter = model_and_adapter(name)
    if model is None and not is_adapter(user_path(name)):
        return locate(name, revision, config_only)
    folder = adapter_folder(adapter)
    return replace(base_of(folder, model, revision, config_only), name=name, adapter=folder)


def adapter_folder(name: str) -> Path:
    """Return the folder of a LoRA adapter, which is downloaded where it is a hub id.

    Raises:
        UsageError: there is none.
        EnvironmentFault: the hub cannot be reached.
    """
    folder = user_path(name) if user_path(name).exists() else locate(name, wanted=_WANTED).path
    if not folder.is_dir() or not (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{name} is no LoRA adapter: it has no {ADAPTER_CONFIG}",
            hint="name a folder that peft wrote: adapter_config.json and adapter_model.safetensors",
        )
    return folder


def base_of(folder: Path, model: str | None = None, revision: str | None = None, config_only: bool = False) -> Source:
    """Find the model that an adapter is added to: as named, or the one that its settings say it was trained on.

    Raises:
        UsageError: it is not there, or not said.
        EnvironmentFault: the hub cannot be reached.
    """
    if model is not None:
        return locate(model, revision, config_only)
    settings = read_json(folder / ADAPTER_CONFIG)
    said, at = settings.get("base_model_name_or_path"), settings.get("revision")
    hint = "name it: --base MODEL, or MODEL+ADAPTER where sources are listed"
    if not isinstance(said, str) or not said:
        raise UsageError(f"{folder / ADAPTER_CONFIG} does not say what model the adapter was trained on", hint=hint)
    try:
        return locate(said, at if isinstance(at, str) and not user_path(said).exists() else None, config_only)
    except UsageError as error:
        raise UsageError(f"{folder} was trained on {said}: {error.message}", hint=hint) from None
