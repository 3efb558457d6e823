"""Layer-wise calibration: decides every layer's blueprint on real text, with one decoder layer in memory.

The residual streams of all calibration tokens are kept in files. In ``parallel`` mode every layer sees what the dense
model feeds it; in ``sequential`` mode what the already converted layers below feed it, beside the dense model's stream,
which says what the layer should have put out (the order of GPTQ and SparseGPT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear

from upcycle.activations import HELD_OUT_EVERY, Activations, Inputs, Slots
from upcycle.blueprint import LayerBlueprint, save_blueprint
from upcycle.capture import captured
from upcycle.errors import CheckpointError
from upcycle.feed_forward import FeedForward
from upcycle.layers import LayerRunner
from upcycle.planning import CALIBRATION_BATCH_TOKENS, MOST_CACHE_BYTES, REUSED_BYTES
from upcycle.progress import Progress
from upcycle.provenance import BLUEPRINT_FILE, hash_tokens
from upcycle.refit import Routing, fit_down, fit_scale
from upcycle.runtime import available_memory, reuse_freed_memory
from upcycle.token_files import TokenFile, write_together
from upcycle.workspace import CALIBRATION_FOLDER, LAYER_BLUEPRINTS

if TYPE_CHECKING:
    from upcycle.checkpoint import DenseCheckpoint
    from upcycle.job import Job
    from upcycle.samples import Samples


class Calibration:
    """The walk through the layers of one conversion.

    Args:
        job: the conversion; its recipe names the text.
        checkpoint: the dense model.
        windows: the calibration tokens, ids ``[N, W]``.
        folder: where token files are kept while it lasts, and the finished blueprints in ``layer_blueprints``.
        progress: where to report.
        samples: where a router tells several sources apart: whose tokens the windows are.
    """

    def __init__(
        self,
        job: Job,
        checkpoint: DenseCheckpoint,
        windows: torch.Tensor,
        folder: Path,
        progress: Progress,
        samples: Samples | None = None,
    ) -> None:
        self._job, self._checkpoint, self._progress = job, checkpoint, progress
        self._tokens_folder = folder / CALIBRATION_FOLDER
        self._blueprints = folder / LAYER_BLUEPRINTS
        self._tokens_folder.mkdir(exist_ok=True)
        self._blueprints.mkdir(exist_ok=True)
        self.windows = windows
        self._samples = samples
        count, self._window = windows.shape
        # At least eight batches, so that some can be held out; at most what keeps matrix products busy.
        per_batch = max(1, min(CALIBRATION_BATCH_TOKENS // self._window, count // HELD_OUT_EVERY))
        self._batch = per_batch * self._window
        self._runner = LayerRunner(checkpoint, job.recipe.dtype, self._window)
        self._sequential = job.calibration_mode == "sequential"
        self._cache_bytes = min(MOST_CACHE_BYTES, available_memory() // 4)

    def run(self) -> None:
        """Decide all layers that an earlier run did not; leaves one blueprint file per MoE layer.

        Raises:
            CheckpointError: activations or fits are not finite.
        """
        layers = len(self._runner.layers)
        moe_layers = self._job.shape.moe_layers
        if self._samples is not None and not self._job.router.walks:
            self._from_embeddings(moe_layers)
            return
        start = self._resume_at()
        importance = self._importance() if self._job.method.needs_gradients else {}
        with self._progress.phase("calibrating", layers):
            self._progress.advance(start)
            if start == 0:
                self._stream("dense", 0).write(map(self._runner.embed, self.windows.flatten().split(self._batch)))
            for index in range(start, max(moe_layers) + 1):
                with self._runner.loaded(index), torch.no_grad():
                    if index in moe_layers:
                        self._moe_layer(index, importance.get(index))
                    else:
                        self._dense_layer(index)
                for name in ("dense", "moe"):
                    self._stream(name, index).release()
                self._progress.advance()
            self._progress.advance(layers - max(moe_layers) - 1)

    @property
    def record(self) -> dict[str, Any]:
        """What ``upcycle.json`` says about the text: how much, and the SHA-256 of the token ids."""
        return {
            "text": self._samples_of if self._samples else self._job.recipe.calibration.texts,
            "tokens": self.windows.numel(),
            "window": self._window,
            "mode": self._job.calibration_mode,
            "token_ids_sha256": hash_tokens(self.windows),
        }

    @property
    def _samples_of(self) -> list[str]:
        told = self._job.method.told(self._job.recipe.sources)
        if self._job.router.samples == "text":
            return [name for source in told for name in source.texts]
        return [f"prompts of {source.name}" for source in told]

    def _from_embeddings(self, layers: Sequence[int]) -> None:
        """Decide every layer on the tokens' embeddings: no layer runs."""
        embedded = self._stream("dense", 0)
        embedded.write(map(self._runner.embed, self.windows.flatten().split(self._batch)))
        for index in layers:
            if not self._file(index).exists():
                self._of_sources(index, embedded)
        embedded.release()

    def _of_sources(self, index: int, inputs: TokenFile) -> None:
        """Decide a layer whose router tells several sources apart; which neurons are active is nobody's question."""
        from upcycle.conversion import decide
        from upcycle.routers.of_sources import condition, own_expert

        job, ffn = self._job, self._checkpoint.feed_forward(index, self._job.recipe.dtype)
        activations = activations_of(ffn, inputs, self._batch, samples=self._samples)
        blueprint = decide(job, ffn, activations)
        assert blueprint.router is not None
        report: dict[str, Any] = {"layer": index, "router_condition": condition(blueprint.router)}
        if job.router.walks:
            report["own_expert"] = own_expert(activations, blueprint, blueprint.router)
        save_blueprint(self._file(index), blueprint, report)

    def _stream(self, name: str, index: int) -> TokenFile:
        return TokenFile(self._tokens_folder / f"{name}.{index}", self._checkpoint.config.hidden_size)

    def _resume_at(self) -> int:
        """The first layer that is not decided and whose inputs are there."""
        undecided = [layer for layer in self._job.shape.moe_layers if not self._file(layer).exists()]
        last = undecided[0] if undecided else max(self._job.shape.moe_layers) + 1
        for index in range(last, 0, -1):
            needed = ("dense", "moe") if self._differs(index) else ("dense",)
            if all(self._stream(name, index).holds(self.windows.numel()) for name in needed):
                return index
        return last if not undecided else 0

    def _differs(self, index: int) -> bool:
        """Whether the converted model's stream is another than the dense model's at the input of layer ``index``."""
        return self._sequential and index > min(self._job.shape.moe_layers)

    def _file(self, layer: int) -> Path:
        return self._blueprints / f"{layer:05d}.safetensors"

    def _importance(self) -> dict[int, torch.Tensor]:
        """Every layer's importance, from one pass forward and one backward through the dense model."""
        from upcycle.gradients import read_importance, write_importance

        path = self._tokens_folder / "importance.safetensors"
        if not path.exists():
            clusters = self._job.shape.experts
            write_importance(path, self._runner, self._checkpoint, self.windows, clusters, self._job, self._progress)
        return read_importance(path)

    def _dense_layer(self, index: int) -> None:
        for name in ("dense", "moe") if self._differs(index) else ("dense",):
            states = self._stream(name, index).blocks(self._batch)
            self._stream(name, index + 1).write(self._runner.whole(index, block) for block in states)

    def _moe_layer(self, index: int, importance: torch.Tensor | None) -> None:
        inputs, residual = self._stream("x", index), self._stream("residual", index)
        self._run_attention(index, inputs, residual)
        block = self._runner.block(index)
        if self._differs(index):
            states = self._stream("dense", index).blocks(self._batch)
            self._stream("dense", index + 1).write(self._runner.whole(index, block) for block in states)
        else:
            pairs = zip(residual.blocks(self._batch), inputs.blocks(self._batch), strict=True)
            self._stream("dense", index + 1).write(before + block(x) for before, x in pairs)
        if self._samples is not None:
            self._of_sources(index, inputs)
            inputs.release()
            residual.release()
            return
        ffn = self._checkpoint.feed_forward(index, self._job.recipe.dtype)
        activations = activations_of(ffn, inputs, self._batch, importance, self._cache_bytes)
        targets = targets_of(self._stream("dense", index + 1), residual, self._batch)
        decision = decide_layer(self._job, ffn, activations, targets)
        if self._sequential:
            self._continue(index, decision, residual)
        save_blueprint(self._file(index), decision.blueprint, {"layer": index, **decision.report})
        inputs.release()
        residual.release()

    def _run_attention(self, index: int, inputs: TokenFile, residual: TokenFile) -> None:
        """Write what the FFN of a layer reads and what its output is added to."""
        source = self._stream("moe" if self._differs(index) else "dense", index)
        rows = (self._runner.around(index, states) for states in source.blocks(self._batch))
        write_together([inputs, residual], rows)

    def _continue(self, index: int, decision: Decision, residual: TokenFile) -> None:
        """Write the converted model's stream after this layer, computed with the weights as they will be stored."""
        down = decision.routing.stored(decision.blueprint)
        pairs = zip(residual.blocks(self._batch), decision.slots.batches(), strict=True)
        outputs = (before + linear(batch.hidden, down) for before, batch in pairs)
        self._stream("moe", index + 1).write(outputs)


def activations_of(
    ffn: FeedForward,
    inputs: TokenFile,
    batch: int,
    importance: torch.Tensor | None = None,
    cache_bytes: int = 0,
    samples: Samples | None = None,
) -> Activations:
    """The activations of a layer whose FFN inputs are in a file, ``batch`` tokens at a time, every eighth batch held out."""

    def batches() -> Iterator[Inputs]:
        for number, x in enumerate(inputs.blocks(batch)):
            yield Inputs(x, torch.ones(len(x)), number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)

    return Activations(ffn, batches, inputs.tokens, importance, cache_bytes, samples)


def targets_of(dense: TokenFile, residual: TokenFile, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    """What a layer's experts should put out: the dense model's stream after it, less the converted one's before its FFN."""

    def targets() -> Iterator[torch.Tensor]:
        pairs = zip(dense.blocks(batch), residual.blocks(batch), strict=True)
        return (whole - before for whole, before in pairs)

    return targets


class Decision(NamedTuple):
    """What became of a layer: its blueprint, what was measured on the way, and what is active in its slots."""

    blueprint: LayerBlueprint
    report: dict[str, Any]
    routing: Routing
    slots: Slots


def decide_layer(
    job: Job, ffn: FeedForward, activations: Activations, targets: Callable[[], Iterator[torch.Tensor]]
) -> Decision:
    """A layer's blueprint with its router and refitted down projections, and what was measured on the way.

    Args:
        job: names method, router and refit.
        ffn: the dense layer.
        activations: its calibration tokens.
        targets: starts a pass over what the layer should put out, fp32 ``[t, d]`` for every batch.

    Raises:
        CheckpointError: the fit is not finite in the stored dtype.
    """
    from upcycle.conversion import decide  # the same decision as without calibration

    blueprint = decide(job, ffn, activations)
    report: dict[str, Any] = {}
    if job.shape.top_k < job.shape.experts and blueprint.router is not None:
        rows = blueprint.router.to(ffn.gate.dtype).float()
        report |= asdict(captured(activations, blueprint, rows))
    routing = Routing(blueprint, ffn.down, ffn.gate.dtype)
    slots = Slots(activations, routing.active)
    if job.refit == "none":
        return Decision(blueprint, report, routing, slots)
    if job.refit == "scale":
        factor, fit = fit_scale(routing, slots, targets())
        blueprint = replace(blueprint, scale=job.shape.top_k * factor)
        return Decision(blueprint, report | fit.as_dict(), routing, slots)
    down, fit = fit_down(routing.down, slots, targets())
    stored = down.to(ffn.down.dtype)
    if not bool((stored * blueprint.scale).isfinite().all()):
        raise CheckpointError(f"layer {ffn.layer}: the refit overflows {ffn.down.dtype}", hint="--dtype bfloat16")
    return Decision(replace(blueprint, down=stored), report | fit.as_dict(), routing, slots)


def calibrate(
    job: Job,
    checkpoint: DenseCheckpoint,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
    samples: Samples | None = None,
) -> dict[str, Any]:
    """Decide every MoE layer of ``job``, leaving one file per layer in ``folder/layer_blueprints``.

    Returns:
        What was read, for ``upcycle.json``.
    """
    reuse_freed_memory(REUSED_BYTES)
    calibration = Calibration(job, checkpoint, windows, folder, progress, samples)
    if not (folder / BLUEPRINT_FILE).exists():  # else an earlier run was stopped after everything was decided
        calibration.run()
    return calibration.record
