"""Layer-wise calibration: decides every layer's blueprint on real text, with one decoder layer in memory.

The residual streams of all calibration tokens are kept in files. In ``parallel`` mode every layer reads the dense model's
stream. In ``sequential`` mode it reads the stream of the converted layers below it, and is fitted to the output of the dense
model's stream, which runs beside it (the order of GPTQ, arXiv 2210.17323, and SparseGPT, arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.calibration.blueprint_join import joined_blueprint, layer_file
from upcycle.calibration.decide_layer import (
    Decision,
    activations_of,
    decide,
    decide_layer,
    outputs_of,
    targets_of,
    weights_behind_norm,
)
from upcycle.calibration.imitate import imitate_layer
from upcycle.calibration.source_walks import SourceWalks, attend, feed
from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.ffn.activations import HELD_OUT_EVERY, Activations
from upcycle.ffn.blueprint import save_blueprint
from upcycle.files.formats.token_files import TokenFile, write_together
from upcycle.files.output.workspace import CALIBRATION_FOLDER, LAYER_BLUEPRINTS
from upcycle.files.records import hash_tokens
from upcycle.hardware.memory import available_memory, reuse_freed_memory
from upcycle.models.layer_runner import LayerRunner, Pixels
from upcycle.planning.cost import CALIBRATION_BATCH_TOKENS, MOST_CACHE_BYTES, REUSED_BYTES
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.ffn.source_samples import Samples
    from upcycle.planning.expert_job import ExpertJob


class Calibration:
    """Walks through the layers of one conversion, and decides each.

    Args:
        job: the conversion; its recipe names the text.
        checkpoint: the dense model.
        windows: the calibration tokens, ids ``[N, W]``. A method that mixes models runs each of them on these.
        folder: receives the finished blueprints in ``layer_blueprints``, and holds token files until the last layer is decided.
        progress: where to report.
        samples: the tokens by which a router tells several sources apart, each with the source that it belongs to; None: the
            router reads none.
        pixels: gives the images that ``windows`` are the numbers of; None: they are token ids.
    """

    def __init__(
        self,
        job: ExpertJob,
        checkpoint: DenseCheckpoint,
        windows: torch.Tensor | None,
        folder: Path,
        progress: Progress,
        samples: Samples | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        self._job, self._checkpoint, self._progress = job, checkpoint, progress
        self._folder = folder
        self._tokens_folder = folder / CALIBRATION_FOLDER
        self._samples = samples
        self._sources: SourceWalks | None = None
        if windows is not None and job.members:
            assert isinstance(checkpoint, MixedCheckpoint)
            members = {source: checkpoint.members[source] for source in job.members + job.shared_members}
            batch = _batch_of(windows)
            self._sources = SourceWalks(members, job.recipe.dtype, windows, self._tokens_folder, batch)
        self._walks = self._sources is None if samples is None else job.router.walks  # whether the dense model runs
        seen = windows if samples is None else samples.windows
        assert seen is not None
        self.windows, self._batch = seen, _batch_of(seen)
        self._runner = LayerRunner(checkpoint, job.recipe.dtype, seen.shape[1], pixels)
        self._sequential = job.calibration_mode == "sequential"
        self._cache_bytes = min(MOST_CACHE_BYTES, available_memory() // 4)

    def run(self) -> None:
        """Decide all layers that an earlier run did not, and write one blueprint file per MoE layer.

        Raises:
            CheckpointError: activations or fits are not finite.
        """
        self._tokens_folder.mkdir(exist_ok=True)
        (self._folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
        layers = len(self._runner.layers)
        moe_layers = self._job.shape.moe_layers
        start = self._resume_at()
        importance = self._importance() if self._job.method.needs_gradients else {}
        with self._progress.phase("calibrating", layers):
            self._progress.advance(start)
            if start == 0:
                self._start()
            for index in range(start, max(moe_layers) + 1):
                if self._sources:
                    self._sources.step(index, index in moe_layers)
                if self._walks:
                    self._layer(index, importance)
                elif index in moe_layers:
                    self._of_sources(index, self._stream("dense", 0))
                if self._sources:
                    self._sources.release(index)
                self._progress.advance()
            self._progress.advance(layers - max(moe_layers) - 1)

    @property
    def record(self) -> dict[str, Any]:
        """What ``upcycle.json`` says about the text: its names, its length, and the SHA-256 of the token ids."""
        texts = self._job.recipe.calibration.texts
        said = {**_read(self._samples_of if self._samples else texts, self.windows), "mode": self._job.calibration_mode}
        if self._samples and self._sources:
            said["sources"] = _read(texts, self._sources.windows)
        return said

    @property
    def _samples_of(self) -> list[str]:
        assert self._job.mixing is not None
        recipes = self._job.mixing.source_recipes(self._job.recipe.sources)
        if self._job.router.samples == "text":
            return [name for source in recipes for name in source.texts]
        return [f"prompts of {source.name}" for source in recipes]

    def _start(self) -> None:
        """Write the tokens' embeddings for every model that will read them."""
        if self._walks or self._samples:
            self._stream("dense", 0).write(map(self._runner.embed, self.windows.flatten().split(self._batch)))
        if self._sources:
            self._sources.start()

    def _of_sources(self, index: int, inputs: TokenFile) -> None:
        """Decide a layer of several sources.

        ``inputs`` are what a router that tells the sources apart reads, where there is one: the inputs of the FFN, or embeddings,
        for which no layer of the dense model runs.
        """
        from upcycle.routers.for_mixing.base import condition, own_expert

        job, ffn = self._job, self._checkpoint.feed_forward(index, self._job.recipe.dtype)
        sources = partial(self._of_source, index) if self._sources else None
        if self._samples:
            activations = activations_of(ffn, inputs, self._batch, samples=self._samples, sources=sources)
        else:
            activations = self._of_source(index, job.members[0], sources)
        blueprint = decide(job, ffn, activations)
        report: dict[str, Any] = {"layer": index, **activations.measured}
        if self._samples:
            assert blueprint.router is not None
            report["router_condition"] = condition(blueprint.router)
            if job.router.walks:
                report["own_expert"] = own_expert(activations, blueprint, blueprint.router)
        save_blueprint(self._file(index), blueprint, report)

    def _of_source(self, index: int, source: int, sources: Callable[[int], Activations] | None = None) -> Activations:
        """Return the activations of one source's FFN on that source's own states."""
        assert self._sources
        assert isinstance(self._checkpoint, MixedCheckpoint)
        ffn = self._checkpoint.members[source].feed_forward(index, self._job.recipe.dtype)
        return activations_of(ffn, self._sources.inputs(source, index), self._sources.batch, sources=sources)

    def _stream(self, name: str, index: int) -> TokenFile:
        return TokenFile(self._tokens_folder / f"{name}.{index}", self._checkpoint.config.hidden_size)

    def _resume_at(self) -> int:
        """Return the layer at which to continue: the last, up to the first undecided one, whose inputs are on the disk."""
        undecided = [layer for layer in self._job.shape.moe_layers if not self._file(layer).exists()]
        last = undecided[0] if undecided else max(self._job.shape.moe_layers) + 1
        for index in range(last, 0, -1):
            if self._holds(index):
                return index
        return last if not undecided else 0

    def _holds(self, index: int) -> bool:
        """Return whether every stream that layer ``index`` reads is on the disk."""
        needed = [("dense", index)] if self._walks else [("dense", 0)] if self._samples else []
        if self._differs(index):
            needed.append(("moe", index))
        tokens = self.windows.numel()
        there = all(self._stream(name, layer).holds(tokens) for name, layer in needed)
        return there and (self._sources is None or self._sources.holds(index))

    def _differs(self, index: int) -> bool:
        """Return whether the converted model's stream differs from the dense model's at the input of layer ``index``."""
        return self._sequential and index > min(self._job.shape.moe_layers)

    def _file(self, layer: int) -> Path:
        return layer_file(self._folder, layer)

    def _importance(self) -> dict[int, torch.Tensor]:
        """Return every layer's importance, fp32 ``[C, F]``, from one pass forward and one backward through the dense model."""
        from upcycle.calibration.neuron_importance import read_importance, write_importance

        path = self._tokens_folder / "importance.safetensors"
        if not path.exists():
            clusters = self._job.shape.experts
            write_importance(path, self._runner, self._checkpoint, self.windows, clusters, self._job, self._progress)
        return read_importance(path)

    def _layer(self, index: int, importance: Mapping[int, torch.Tensor]) -> None:
        with self._runner.loaded(index), torch.no_grad():
            if index in self._job.shape.moe_layers:
                self._moe_layer(index, importance.get(index))
            else:
                self._dense_layer(index)
        for name in ("dense", "moe"):
            self._stream(name, index).release()

    def _dense_layer(self, index: int) -> None:
        for name in ("dense", "moe") if self._differs(index) else ("dense",):
            states = self._stream(name, index).blocks(self._batch)
            self._stream(name, index + 1).write(self._runner.whole(index, block) for block in states)

    def _moe_layer(self, index: int, importance: torch.Tensor | None) -> None:
        imitated = imitate_layer(
            self._job, self._runner, self._stream("dense", index), self._batch, self._folder, index
        )
        inputs, residual, normed = self._stream("x", index), self._stream("residual", index), self._runner.norms_output
        made = self._stream("made", index) if normed else None
        states = self._stream("moe" if self._differs(index) else "dense", index)
        attend(self._runner, index, states, inputs, residual, self._batch)
        sums = self._stream("sums", index) if self._runner.closes else self._stream("dense", index + 1)
        if self._differs(index):
            dense = self._stream("dense", index).blocks(self._batch)
            if made is None:
                sums.write(self._runner.summed(index, block) for block in dense)
            else:
                write_together([sums, made], (self._runner.outcome(index, block) for block in dense))
        else:
            feed(self._runner, index, inputs, residual, sums, self._batch, made)
        if self._runner.closes:
            self._stream("dense", index + 1).write(self._runner.closed(index, s) for s in sums.blocks(self._batch))
        if self._samples is not None:
            self._of_sources(index, inputs)
            for file in (inputs, residual, *([made] if made else [])):
                file.release()
            return
        ffn = self._checkpoint.feed_forward(index, self._job.recipe.dtype)
        weights, targets = None, targets_of(sums, residual, self._batch)
        if made is not None:
            weights = weights_behind_norm(made, self._batch, self._job.dense.rms_norm_eps)
            targets = outputs_of(made, self._batch)
        activations = activations_of(ffn, inputs, self._batch, importance, self._cache_bytes, weights=weights)
        decision = decide_layer(self._job, ffn, activations, targets)
        if self._sequential:
            self._continue(index, decision, residual)
        report = {"layer": index, **activations.measured, **decision.report, **imitated}
        save_blueprint(self._file(index), decision.blueprint, report)
        for file in (inputs, residual, *([made] if made else []), *([sums] if self._runner.closes else [])):
            file.release()

    def _continue(self, index: int, decision: Decision, residual: TokenFile) -> None:
        """Write the converted model's stream after this layer, computed with the weights in the dtype that is stored."""
        pairs = zip(residual.blocks(self._batch), decision.outputs.on_calibration(), strict=True)
        outputs = (self._runner.closed(index, before + self._runner.added(index, made)) for before, made in pairs)
        self._stream("moe", index + 1).write(outputs)


def _batch_of(windows: torch.Tensor) -> int:
    """Return the tokens of a batch.

    There are at least eight batches, of which every eighth is held out; a batch is no larger than matrix products need it.
    """
    count, window = windows.shape
    return max(1, min(CALIBRATION_BATCH_TOKENS // window, count // HELD_OUT_EVERY)) * window


def _read(texts: list[str], windows: torch.Tensor) -> dict[str, Any]:
    tokens, window = windows.numel(), windows.shape[1]
    return {"text": texts, "tokens": tokens, "window": window, "token_ids_sha256": hash_tokens(windows)}


def calibrate(
    job: ExpertJob,
    checkpoint: DenseCheckpoint,
    windows: torch.Tensor | None,
    folder: Path,
    progress: Progress,
    samples: Samples | None = None,
    pixels: Pixels | None = None,
) -> dict[str, Any]:
    """Decide every MoE layer of ``job``, and write one file per layer to ``folder/layer_blueprints``.

    The arguments are those of :class:`Calibration`.

    Returns:
        :attr:`Calibration.record`: what ``upcycle.json`` says about the text.

    Raises:
        CheckpointError: activations or fits are not finite.
    """
    reuse_freed_memory(REUSED_BYTES)
    calibration = Calibration(job, checkpoint, windows, folder, progress, samples, pixels)
    if joined_blueprint(job, folder) is None:  # else an earlier run was stopped after everything was decided
        calibration.run()
    return calibration.record
