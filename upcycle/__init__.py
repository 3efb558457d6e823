"""Turns a dense transformer checkpoint into a Mixture-of-Experts one, proves it, and keeps it usable everywhere."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle.card import write_card
    from upcycle.comparison import compare
    from upcycle.conversion import convert
    from upcycle.evaluation import evaluate
    from upcycle.hub import push, save_to_hub
    from upcycle.planning import plan
    from upcycle.report.writing import write_report
    from upcycle.serving.checking import verify_with
    from upcycle.trainers.checkpoints.export import export
    from upcycle.trainers.forecast.plan_training import plan_training
    from upcycle.trainers.run.loop import train
    from upcycle.verification import verify

__version__ = "0.1.0"
__all__ = [
    "compare",
    "convert",
    "evaluate",
    "export",
    "plan",
    "plan_training",
    "push",
    "save_to_hub",
    "train",
    "verify",
    "verify_with",
    "write_card",
    "write_report",
]

# Loaded when first used: importing torch takes seconds, and `upcycle --help` must not wait for it.
_FUNCTIONS = {
    "compare": "comparison",
    "convert": "conversion",
    "evaluate": "evaluation",
    "export": "trainers.checkpoints.export",
    "plan": "planning",
    "plan_training": "trainers.forecast.plan_training",
    "push": "hub",
    "save_to_hub": "hub",
    "train": "trainers.run.loop",
    "verify": "verification",
    "verify_with": "serving.checking",
    "write_card": "card",
    "write_report": "report.writing",
}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'upcycle' has no attribute '{name}'")
    return getattr(import_module(f"upcycle.{_FUNCTIONS[name]}"), name)
