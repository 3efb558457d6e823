"""Layer-wise calibration of models whose layers are no single row: encoder and decoder, two towers, stages, layers with more inputs.

The stock model runs by its own code, once per batch, and pauses at every layer (:mod:`upcycle.models.paused_passes`); one layer has
its weights in memory at a time. In ``parallel`` mode every layer reads the dense model's states. In ``sequential`` mode a second
pass of every batch runs with the converted layers, and a layer is fitted to the dense model's stream less that pass's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.dense.base import Family
from upcycle.architectures.module_paths import module_paths_in, text_config
from upcycle.calibration.blueprint_join import decided_layer, joined_blueprint, layer_file
from upcycle.calibration.decide_layer import Outputs, computed, decide_layer
from upcycle.errors import CheckpointError
from upcycle.ffn.activations import HELD_OUT_EVERY, Activations, Inputs
from upcycle.ffn.blueprint import save_blueprint
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.hardware.memory import available_memory, reuse_freed_memory
from upcycle.models.paused_passes import LayerCall, PausedPass, PausedPasses, stream_of
from upcycle.models.stock_layers import layers_of
from upcycle.planning.cost import MOST_CACHE_BYTES, REUSED_BYTES
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.ffn.blueprint import LayerBlueprint
    from upcycle.inputs.reader import InputBatch
    from upcycle.planning.expert_job import ExpertJob

_PLAIN = (
    1e-3  # of what an FFN made, at most: how far it may be from what the layer adds, for the layer to add it as it is
)


@dataclass
class _Seen:
    """What a layer's FFN reads and makes ``[t, d]``, the sum it is added into (None: not seen), and the layer's output."""

    x: torch.Tensor
    made: torch.Tensor
    sums: torch.Tensor | None
    output: Any


class FfnOfLayer:
    """Finds the FFN in one layer of a stock model, records it, and puts something else in its place.

    Args:
        passes: runs the layer.
        layer: the module.
        family: where its FFN is.
        index: the layer's number.
    """

    def __init__(self, passes: PausedPasses, layer: torch.nn.Module, family: Family, index: int) -> None:
        place = family.module_paths.place(index)
        self._passes = passes
        self.first = layer.get_submodule(place.first)
        self.last = layer.get_submodule(place.ends or place.first)
        self.closing = None if place.closing is None else layer.get_submodule(place.closing)

    def seen(self, call: LayerCall) -> _Seen:
        """Run the layer as it is, and return what is seen of its FFN."""
        found: dict[str, torch.Tensor] = {}
        hooks = [
            self.first.register_forward_pre_hook(lambda _, args: found.update(x=args[0])),
            self.last.register_forward_hook(lambda _, __, output: found.update(made=output.clone())),
        ]
        if self.closing is not None:
            hooks.append(self.closing.register_forward_pre_hook(lambda _, args: found.update(sums=args[0].clone())))
        try:
            output = self._passes.run(call)
        finally:
            for hook in hooks:
                hook.remove()
        sums = found.get("sums", stream_of(output))
        return _Seen(found["x"], found["made"], sums if sums.shape == found["made"].shape else None, output)

    def around(self, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the FFN reads, and the layer's output without it, before a norm at the layer's end."""
        read: list[torch.Tensor] = []

        def nothing(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

        with self._replaced(nothing, read), self._unclosed():
            residual = stream_of(self._passes.run(call))
        return read[0], residual

    def with_output(self, call: LayerCall, made: torch.Tensor) -> Any:
        """Return what the layer gives where ``made`` stands for its FFN's output."""
        with self._replaced(lambda _: made, []):
            return self._passes.run(call)

    @contextmanager
    def _replaced(self, ffn: Any, read: list[torch.Tensor]) -> Iterator[None]:
        def capture(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            read.append(x)
            return x

        whole = self.first is self.last
        self.first.forward = (lambda x, *_, **__: ffn(capture(x))) if whole else capture
        if not whole:
            self.last.forward = lambda *_, **__: ffn(read[-1])
        try:
            yield
        finally:
            for module in (self.first, self.last):
                module.__dict__.pop("forward", None)

    @contextmanager
    def _unclosed(self) -> Iterator[None]:
        if self.closing is None:
            yield
            return
        self.closing.forward = lambda states: states
        try:
            yield
        finally:
            del self.closing.forward


class PausedCalibration:
    """Walks through the layers of one conversion in the order in which the model calls them, and decides each.

    Args:
        job: the conversion.
        checkpoint: the dense model.
        batches: what the model reads.
        folder: receives the finished blueprints in ``layer_blueprints``. A run that continues computes its states again, and takes
            the layers that were decided as they are.
        progress: where to report.
    """

    def __init__(
        self, job: ExpertJob, checkpoint: DenseCheckpoint, batches: list[InputBatch], folder: Path, progress: Progress
    ) -> None:
        self._job, self._checkpoint, self._folder, self._progress = job, checkpoint, folder, progress
        self._batches = batches
        self._layers = layers_of(checkpoint, job.recipe.dtype)
        model = self._layers.model.eval()
        self._modules = list(checkpoint.family.module_paths.layers_in(model))
        self._outer = module_paths_in(model)
        self._passes = PausedPasses(model, self._modules)
        self._sequential = job.calibration_mode == "sequential"
        self._cache_bytes = min(MOST_CACHE_BYTES, available_memory() // 4)
        family, layers = checkpoint.family, len(self._modules)
        self._part_of = {i: part for part in family.parts for i in family.layers_of((part,), layers)}

    def run(self) -> None:
        """Decide all layers that an earlier run did not, and write one blueprint file per MoE layer.

        Raises:
            CheckpointError: activations or fits are not finite, or a layer runs more than once.
        """
        reuse_freed_memory(REUSED_BYTES)
        (self._folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
        left, unseen = set(self._job.shape.moe_layers), len(self._modules)
        sides = 2 if self._sequential else 1
        inputs = [{**batch.arguments, **self._settings()} for batch in self._batches] * sides
        with (
            self._progress.phase("calibrating", len(self._modules)),
            torch.no_grad(),
            self._passes.over(inputs) as passes,
        ):
            while left:
                index = self._where(passes)
                held = self._held(index)
                if held is not None:
                    self._layers.load(held)
                if index in self._job.shape.moe_layers and index not in left:
                    raise CheckpointError(
                        f"layer {index} of this model runs more than once, and its fit needs the inputs of one run"
                    )
                outputs = (
                    self._decide(index, passes) if index in left else [self._passes.run(self._call(p)) for p in passes]
                )
                if held is not None:
                    self._layers.drop(held)
                left.discard(index)
                self._progress.advance()
                unseen -= 1
                if left:
                    for one, output in zip(passes, outputs, strict=True):
                        one.resume(output)
            self._progress.advance(unseen)

    def _held(self, index: int) -> int | None:
        """Return the number by which a layer is loaded; None: it is in memory, as all parts beside a text model are."""
        return self._outer.layer_of(f"{self._checkpoint.family.module_paths.layer(index)}.")

    def _settings(self) -> dict[str, Any]:
        """Return arguments that keep a model from caches, which would grow with every run of a layer."""
        model = self._layers.model
        for config in (model.config, text_config(model.config)):
            config.use_cache = False
        return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}

    def _where(self, passes: list[PausedPass]) -> int:
        found = {one.call.layer if one.call else None for one in passes}
        if len(found) > 1 or None in found:
            raise CheckpointError("the model ends before all of its layers ran: some are not called for these inputs")
        return self._call(passes[0]).layer

    @staticmethod
    def _call(one: PausedPass) -> LayerCall:
        assert one.call is not None
        return one.call

    def _decide(self, index: int, passes: list[PausedPass]) -> list[Any]:
        """Decide a layer, write its blueprint, and return the layer's outputs for every pass."""
        ffn = FfnOfLayer(self._passes, self._modules[index], self._checkpoint.family, index)
        count = len(self._batches)
        seen = [ffn.seen(self._call(one)) for one in passes[:count]]
        outputs = [one.output for one in seen]
        if not self._sequential:
            self._decided(
                index, [self._rows(index, i, one.x) for i, one in enumerate(seen)], self._targets(index, seen)
            )
            return outputs
        around = [ffn.around(self._call(one)) for one in passes[count:]]
        plain = self._adds(ffn, seen[0], passes[0])
        targets = self._targets(index, seen, [residual for _, residual in around] if plain else None)
        inputs = [self._rows(index, i, x) for i, (x, _) in enumerate(around)]
        made = self._decided(index, inputs, targets)
        for i, (rows, one, (x, _)) in enumerate(zip(made, passes[count:], around, strict=True)):
            outputs.append(ffn.with_output(self._call(one), self._whole(index, i, rows, x)))
        return outputs

    def _adds(self, ffn: FfnOfLayer, seen: _Seen, one: PausedPass) -> bool:
        """Return whether a layer adds what its FFN makes to the stream as it is: no norm, factor or other shape in between."""
        if seen.sums is None:
            return False
        _, residual = ffn.around(self._call(one))
        if residual.shape != seen.made.shape:
            return False
        odd = (seen.sums - residual - seen.made).norm()
        return bool(odd <= _PLAIN * seen.made.norm() + 1e-5 * seen.sums.norm())

    def _targets(
        self, index: int, seen: list[_Seen], residuals: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return what the layer is fitted to, ``[t, d]`` per batch: what the dense FFN made, or what the stream lacks."""
        found = [one.made for one in seen]
        if residuals is not None:
            found = [one.sums - before for one, before in zip(seen, residuals, strict=True) if one.sums is not None]
        return [self._rows(index, i, one) for i, one in enumerate(found)]

    def _mask(self, index: int, batch: int, like: torch.Tensor) -> torch.Tensor | None:
        """Return which of a layer's positions ``[N, T]`` are no padding; None: all are, or they are no positions of a text."""
        kept, part = self._batches[batch].kept, self._part_of.get(index)
        # Where nobody said which part a layer is of, the numbers do, unless they are those of two parts.
        found = [m for own, m in kept.items() if part in (None, own) and m.shape == like.shape[:-1]]
        return found[0] if len(found) == 1 else None

    def _rows(self, index: int, batch: int, states: torch.Tensor) -> torch.Tensor:
        mask = self._mask(index, batch, states)
        return states.reshape(-1, states.shape[-1]) if mask is None else states[mask]

    def _whole(self, index: int, batch: int, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the FFN's output for all positions: zero at padding, which nothing reads."""
        mask = self._mask(index, batch, like)
        if mask is None:
            return rows.view(*like.shape[:-1], rows.shape[-1])
        made = torch.zeros(*like.shape[:-1], rows.shape[-1])
        made[mask] = rows
        return made

    def _decided(self, index: int, inputs: list[torch.Tensor], targets: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Decide a layer unless an earlier run did; return an iterator over its outputs ``[t, d]``, batch by batch."""
        ffn = self._checkpoint.feed_forward(index, self._job.recipe.dtype)
        weights = self._weights(targets)

        def batches() -> Iterator[Inputs]:
            for number, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
                yield Inputs(x, weight, number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)

        activations = Activations(ffn, batches, sum(map(len, inputs)), cache_bytes=self._cache_bytes)
        found: LayerBlueprint | None = decided_layer(self._job, self._folder, index)
        if found is not None:
            outputs: Outputs = computed(self._job, ffn, found, activations)
        else:
            decision = decide_layer(self._job, ffn, activations, lambda: iter(targets))
            report = {"layer": index, **activations.measured, **decision.report}
            save_blueprint(layer_file(self._folder, index), decision.blueprint, report)
            outputs = decision.outputs
        return outputs.on_calibration()

    def _weights(self, targets: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return how much each token's error counts, mean one: all the same, unless a norm divides by the output's length."""
        if self._checkpoint.family.module_paths.output_norm is None:
            return [torch.ones(len(one)) for one in targets]
        found = [1 / (one.square().mean(1) + self._job.dense.rms_norm_eps) for one in targets]
        mean = torch.cat(found).mean()
        return [one / mean for one in found]


def calibrate_paused(
    job: ExpertJob, checkpoint: DenseCheckpoint, batches: list[InputBatch], folder: Path, progress: Progress
) -> None:
    """Decide every MoE layer of ``job``; see :class:`PausedCalibration`.

    Raises:
        CheckpointError: activations or fits are not finite.
    """
    if joined_blueprint(job, folder) is None:  # else an earlier run was stopped after everything was decided
        PausedCalibration(job, checkpoint, batches, folder, progress).run()
