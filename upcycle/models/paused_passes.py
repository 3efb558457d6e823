"""Passes of a whole stock model that pause at each of its layers, so that layers can be run one by one whatever is between them.

Encoders that hand their states to a decoder, two towers, stages that grow narrower in space: what a layer reads is known only to
the model's own code. That code runs here as it is, on a thread of its own for each input, and waits wherever it calls a layer
until it is told what the layer gives. Only one of all threads ever runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch


class LayerCall(NamedTuple):
    """What a model calls one of its layers with: the layer's number and its arguments."""

    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Given(NamedTuple):
    """An answer to a paused pass: a layer's output, or (``stop``) that the pass is to end."""

    output: Any = None
    stop: bool = False


class _Stop(BaseException):
    """Ends a paused pass; no code of a model catches it."""


class PausedPass:
    """One pass of a model, which :class:`PausedPasses` starts.

    Attributes:
        call: the call of a layer that the pass waits at; None: the pass is over.
    """

    def __init__(self, run: Any) -> None:
        self.call: LayerCall | None = None
        self._said: SimpleQueue[LayerCall | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[_Given] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)
        self._thread.start()
        self._wait()

    def resume(self, output: Any) -> None:
        """Give the paused layer's output to the model, and wait for its next call; ``output`` is what the layer returns."""
        self._answers.put(_Given(output))
        self._wait()

    def stop(self) -> None:
        """End the pass, wherever it waits."""
        if self.call is not None:
            self._answers.put(_Given(stop=True))
            self._wait()

    def pause(self, call: LayerCall) -> Any:
        """Wait at a layer, on the pass's own thread; return the layer's output."""
        self._said.put(call)
        given = self._answers.get()
        if given.stop:
            raise _Stop
        return given.output

    def _wait(self) -> None:
        said = self._said.get()
        self.call = said if isinstance(said, LayerCall) else None
        if said is None or isinstance(said, BaseException):
            self._thread.join()
        if isinstance(said, BaseException):
            raise said

    def _run(self, run: Any) -> None:
        ending: BaseException | None = None
        _OF_THREAD.current = self
        try:
            with torch.no_grad():  # which is a setting of the thread
                run()
        except _Stop:
            pass
        except BaseException as error:  # it is raised again where the pass is waited for
            ending = error
        self._said.put(ending)


_OF_THREAD = threading.local()


class PausedPasses:
    """Passes of one model over several inputs, which all wait at the same layer.

    Args:
        model: a stock model.
        layers: its layers, in the order of their numbers; the model may call them in another order.
    """

    def __init__(self, model: Any, layers: Sequence[torch.nn.Module]) -> None:
        self._model, self._layers = model, list(layers)

    @contextmanager
    def over(self, batches: Sequence[Mapping[str, Any]]) -> Iterator[list[PausedPass]]:
        """Start a pass for each of some arguments of the model; inside the ``with`` block, layers pause, and end with it."""
        started: list[PausedPass] = []
        with self._pausing():
            try:
                for given in batches:
                    started.append(PausedPass(lambda given=given: self._model(**given)))
                yield started
            finally:
                for one in started:
                    one.stop()

    def run(self, call: LayerCall) -> Any:
        """Return what a layer gives for a call, by its own code."""
        layer = self._layers[call.layer]
        return type(layer).forward(layer, *call.args, **call.kwargs)

    @contextmanager
    def _pausing(self) -> Iterator[None]:
        for index, layer in enumerate(self._layers):

            def paused(*args: Any, index: int = index, **kwargs: Any) -> Any:
                return _OF_THREAD.current.pause(LayerCall(index, args, kwargs))

            layer.forward = paused
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward


def stream_of(output: Any) -> torch.Tensor:
    """Return the stream in what a layer gives: the output, or the first of several."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
