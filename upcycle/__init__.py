"""Turns a dense transformer checkpoint into a Mixture-of-Experts checkpoint, and verifies the result."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.version import __version__ as __version__

if TYPE_CHECKING:
    from upcycle.branching.grow import grow
    from upcycle.calibration.compressing.observe_file import observe
    from upcycle.conversion.convert import convert
    from upcycle.conversion.jobs import plan
    from upcycle.conversion.merge_adapter import merge
    from upcycle.conversion.verify import verify
    from upcycle.evaluation.compare import compare
    from upcycle.evaluation.compressing.compare_compressions import compare_compressions
    from upcycle.evaluation.evaluate import evaluate
    from upcycle.inference.offloading.offload import offload
    from upcycle.kernels.entry.transformers_blocks import use_kernels
    from upcycle.kernels.entry.transformers_experts import register_kernels
    from upcycle.publishing.model_card import write_card
    from upcycle.publishing.push import push, save_to_hub
    from upcycle.report.write_report import write_report
    from upcycle.trainers.checkpoints.export import export
    from upcycle.trainers.forecast.plan_training import plan_training
    from upcycle.trainers.run.loop import train
    from upcycle.verification.engines.verify_with import verify_with

__all__ = [
    "compare",
    "compare_compressions",
    "convert",
    "evaluate",
    "export",
    "grow",
    "merge",
    "observe",
    "offload",
    "plan",
    "plan_training",
    "push",
    "register_kernels",
    "save_to_hub",
    "train",
    "use_kernels",
    "verify",
    "verify_with",
    "write_card",
    "write_report",
]

# A checkout has kernels, splitters, trainers and configs beside this folder, and links to them in it. Where git could make no links
# (core.symlinks=false, as on Windows), they are looked for beside it; an installed copy has them inside.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

# Loaded when first used: importing torch takes seconds, and `upcycle --help` must not wait for it.
_FUNCTIONS = {
    "compare": "evaluation.compare",
    "compare_compressions": "evaluation.compressing.compare_compressions",
    "convert": "conversion.convert",
    "evaluate": "evaluation.evaluate",
    "export": "trainers.checkpoints.export",
    "grow": "branching.grow",
    "merge": "conversion.merge_adapter",
    "observe": "calibration.compressing.observe_file",
    "offload": "inference.offloading.offload",
    "plan": "conversion.jobs",
    "plan_training": "trainers.forecast.plan_training",
    "push": "publishing.push",
    "register_kernels": "kernels.entry.transformers_experts",
    "save_to_hub": "publishing.push",
    "train": "trainers.run.loop",
    "use_kernels": "kernels.entry.transformers_blocks",
    "verify": "conversion.verify",
    "verify_with": "verification.engines.verify_with",
    "write_card": "publishing.model_card",
    "write_report": "report.write_report",
}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'upcycle' has no attribute '{name}'")
    return getattr(import_module(f"upcycle.{_FUNCTIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what is loaded when first used is offered, too
