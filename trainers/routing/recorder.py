"""Keeps what chosen modules computed in the last forward pass of a model, and nothing of what is recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from upcycle.errors import UsageError

Recorded = TypeVar("Recorded")


class Recorder(Generic[Recorded]):
    """Records of one forward pass of ``model`` at a time, with the gradients they came with; a context manager.

    Only what runs inside ``model(...)`` is recorded. Activation checkpointing runs layers again in the backward pass,
    when that call has long ended, so nothing counts twice. A hook computes nothing that needs a gradient: the recomputed
    pass would lack it. With gradient accumulation, :meth:`take` the records behind every micro-batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._records: list[Recorded] = []
        self._open = self._gradients = False
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._stop, always_call=True),
        ]

    def watch(self, module: nn.Module, record: Callable[[tuple[Any, ...], Any], Recorded]) -> None:
        """Record ``record(inputs, output)`` whenever ``module`` runs within the model."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._open:
                if self._gradients and not torch.is_grad_enabled():
                    raise UsageError(
                        f"{type(module).__name__} ran without gradients: activation checkpointing is reentrant, which hides "
                        "routers and activations from every loss",
                        hint="set use_reentrant to false",
                    )
                self._records.append(record(inputs, output))

        self._handles.append(module.register_forward_hook(hook))

    def take(self) -> list[Recorded]:
        """The records of the last forward pass, in the order the modules ran; they are handed over and forgotten here."""
        taken, self._records = self._records, []
        return taken

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._records.clear()

    def __enter__(self) -> Recorder[Recorded]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, *_: Any) -> None:
        self._records.clear()
        self._open, self._gradients = True, torch.is_grad_enabled()

    def _stop(self, *_: Any) -> None:
        self._open = False
