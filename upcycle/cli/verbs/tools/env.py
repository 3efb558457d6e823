"""``upcycle env``: prints what a bug report should say about a machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_facts, print_json

_OPTIONAL = (
    "deepspeed",
    "datasets",
    "triton",
    "gguf",
    "accelerate",
    "scikit-learn",
    "pydantic",
    "click",
    "huggingface_hub",
)
_VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "UPCYCLE_DEBUG")


@click.command("env", short_help="Print versions and hardware")
@common_options
def command(as_json: bool, debug: bool) -> None:
    """Print versions and hardware, to paste into a bug report. None of your tokens or paths is printed."""
    facts = environment()
    print_json(facts) if as_json else print_facts([(name, str(value)) for name, value in facts.items()])


def environment() -> dict[str, Any]:
    """Return versions, hardware and the names of relevant environment variables that are set."""
    import psutil
    import torch

    from upcycle.files.records import versions

    facts: dict[str, Any] = dict(versions())
    for package in _OPTIONAL:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["platform"] = platform.platform()
    facts["processors"] = os.cpu_count()
    facts["memory"] = f"{psutil.virtual_memory().total / 1e9:.1f} GB"
    facts["accelerator"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    # Only whether they are set: their values may be private.
    facts["set variables"] = ", ".join(name for name in _VARIABLES if os.environ.get(name)) or "none"
    return facts
