"""Finds the folders of recipes that come with upcycle."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def configs_folder(name: str) -> Path:
    """Return a folder of ``configs/``, which is beside ``upcycle/`` in a checkout without links."""
    return Path(import_module(f"upcycle.configs.{name}").__path__[0])
