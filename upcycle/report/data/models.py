"""Loads the model and its dense parent into memory, in fp32, with stock transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.architectures.stock import load_stock_model
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.conversion.verify import reopen
from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.hardware.memory import available_memory
from upcycle.models.stock_model import StockModel, source_model
from upcycle.report.data.subject import Subject, reason_of


@dataclass(frozen=True)
class Models:
    """Holds the model and its reference.

    Attributes:
        model: the model that the report is about.
        reference: its dense parent, or the source of a growth step; None where there is none.
        block: the name of the FFN in the reference's layers.
        no_reference: why there is no reference.
    """

    model: StockModel
    reference: StockModel | None
    block: str | None
    no_reference: str | None


def load_models(subject: Subject, source: str | None) -> Models:
    """Load the model, and its dense parent if it is found and fits into memory beside it.

    Raises:
        EnvironmentFault: the model does not fit into memory.
        UpcycleError: transformers cannot load it.
    """
    needed = 4 * sum(spec.elements for spec in subject.specs.values())
    _check_fits(needed, subject.name)
    try:
        model = StockModel(load_stock_model(subject.folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"transformers cannot load {subject.name}: {first}") from None
    try:
        reference, block = _reference(subject, source)
    except UpcycleError as error:
        return Models(model, None, None, reason_of(error))
    return Models(model, reference, block, None)


def _reference(subject: Subject, source: str | None) -> tuple[StockModel, str | None]:
    if subject.record is None:
        if source is None:
            raise UsageError("its dense parent is not recorded", hint="name it with --source")
        checkpoint: Any = DenseCheckpoint.open(source)
    else:
        _, checkpoint = reopen(Path(subject.folder), dict(subject.record), source)
    _check_fits(4 * sum(spec.elements for spec in checkpoint.store.specs.values()), checkpoint.source.name)
    paths = checkpoint.family.module_paths if isinstance(checkpoint, DenseCheckpoint) else None
    block = None if paths is None or paths.ends is not None else paths.block  # else no single module is the dense FFN
    return source_model(checkpoint, None, streamed=False), block


def _check_fits(needed: int, name: str) -> None:
    if needed > 0.9 * available_memory():
        raise EnvironmentFault(
            f"{name} needs about {needed / 1e9:.0f} GB in fp32, but {available_memory() / 1e9:.0f} GB are available",
            hint="use a machine with more memory, or --no-run",
        )
