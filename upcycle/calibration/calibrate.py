"""Layer-wise calibration: decides every layer's blueprint on real text, with one decoder layer in memory.

The residual streams of all calibration tokens are kept in files. In ``parallel`` mode every layer sees what the dense
model feeds it; in ``sequential`` mode what the already converted layers below feed it, beside the dense model's stream,
which says what the layer should have put out (the order of GPTQ and SparseGPT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from upcycle.calibration.blueprint_join import joined_blueprint, layer_file
from upcycle.calibration.decide_layer import Decision, activations_of, decide, decide_layer, targets_of
from upcycle.calibration.source_walks import SourceWalks, attend, feed
from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.ffn.activations import HELD_OUT_EVERY, Activations
from upcycle.ffn.blueprint import save_blueprint
from upcycle.files.formats.token_files import TokenFile
from upcycle.files.output.workspace import CALIBRATION_FOLDER, LAYER_BLUEPRINTS
from upcycle.files.records import hash_tokens
from upcycle.hardware.memory import available_memory, reuse_freed_memory
from upcycle.models.layer_runner import LayerRunner
from upcycle.planning.cost import CALIBRATION_BATCH_TOKENS, MOST_CACHE_BYTES, REUSED_BYTES
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.ffn.source_samples import Samples
    from upcycle.planning.expert_job import ExpertJob


class Calibration:
    """The walk through the layers of one conversion.

    Args:
        job: the conversion; its recipe names the text.
        checkpoint: the dense model.
        windows: the calibration tokens, ids ``[N, W]``. A method that mixes models has every one of them walk on these.
        folder: where token files are kept while it lasts, and the finished blueprints in ``layer_blueprints``.
        progress: where to report.
        samples: where a router tells several sources apart: the tokens that the dense model walks on, and whose they are.
    """

    def __init__(
        self,
        job: ExpertJob,
        checkpoint: DenseCheckpoint,
        windows: torch.Tensor | None,
        folder: Path,
        progress: Progress,
        samples: Samples | None = None,
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
        self._runner = LayerRunner(checkpoint, job.recipe.dtype, seen.shape[1])
        self._sequential = job.calibration_mode == "sequential"
        self._cache_bytes = min(MOST_CACHE_BYTES, available_memory() // 4)

    def run(self) -> None:
        """Decide all layers that an earlier run did not; leaves one blueprint file per MoE layer.

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
        """What ``upcycle.json`` says about the text: how much, and the SHA-256 of the token ids."""
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
        """Write the tokens' embeddings, wherever they are to be read."""
        if self._walks or self._samples:
            self._stream("dense", 0).write(map(self._runner.embed, self.windows.flatten().split(self._batch)))
        if self._sources:
            self._sources.start()

    def _of_sources(self, index: int, inputs: TokenFile) -> None:
        """Decide a layer of several sources. ``inputs`` are those of a router that tells them apart, where there is one:
        the FFN's, or embeddings, and then no layer of the dense model runs.
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
        """What one source's FFN does on its own states."""
        assert self._sources
        assert isinstance(self._checkpoint, MixedCheckpoint)
        ffn = self._checkpoint.members[source].feed_forward(index, self._job.recipe.dtype)
        return activations_of(ffn, self._sources.inputs(source, index), self._sources.batch, sources=sources)

    def _stream(self, name: str, index: int) -> TokenFile:
        return TokenFile(self._tokens_folder / f"{name}.{index}", self._checkpoint.config.hidden_size)

    def _resume_at(self) -> int:
        """The first layer that is not decided and whose inputs are there."""
        undecided = [layer for layer in self._job.shape.moe_layers if not self._file(layer).exists()]
        last = undecided[0] if undecided else max(self._job.shape.moe_layers) + 1
        for index in range(last, 0, -1):
            if self._holds(index):
                return index
        return last if not undecided else 0

    def _holds(self, index: int) -> bool:
        """Whether everything is there that layer ``index`` begins with."""
        needed = [("dense", index)] if self._walks else [("dense", 0)] if self._samples else []
        if self._differs(index):
            needed.append(("moe", index))
        tokens = self.windows.numel()
        there = all(self._stream(name, layer).holds(tokens) for name, layer in needed)
        return there and (self._sources is None or self._sources.holds(index))

    def _differs(self, index: int) -> bool:
        """Whether the converted model's stream is another than the dense model's at the input of layer ``index``."""
        return self._sequential and index > min(self._job.shape.moe_layers)

    def _file(self, layer: int) -> Path:
        return layer_file(self._folder, layer)

    def _importance(self) -> dict[int, torch.Tensor]:
        """Every layer's importance, from one pass forward and one backward through the dense model."""
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
        inputs, residual = self._stream("x", index), self._stream("residual", index)
        states = self._stream("moe" if self._differs(index) else "dense", index)
        attend(self._runner, index, states, inputs, residual, self._batch)
        if self._differs(index):
            dense = self._stream("dense", index).blocks(self._batch)
            self._stream("dense", index + 1).write(self._runner.whole(index, block) for block in dense)
        else:
            feed(self._runner, index, inputs, residual, self._stream("dense", index + 1), self._batch)
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
        report = {"layer": index, **activations.measured, **decision.report}
        save_blueprint(self._file(index), decision.blueprint, report)
        inputs.release()
        residual.release()

    def _continue(self, index: int, decision: Decision, residual: TokenFile) -> None:
        """Write the converted model's stream after this layer, computed with the weights as they will be stored."""
        down = decision.routing.stored(decision.blueprint)
        pairs = zip(residual.blocks(self._batch), decision.active.batches(), strict=True)
        outputs = (before + linear(batch.hidden, down, decision.routing.bias) for before, batch in pairs)
        self._stream("moe", index + 1).write(outputs)


def _batch_of(windows: torch.Tensor) -> int:
    """Tokens at a time: at least eight batches, so that some can be held out; at most what keeps matrix products busy."""
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
) -> dict[str, Any]:
    """Decide every MoE layer of ``job``, leaving one file per layer in ``folder/layer_blueprints``.

    Returns:
        What was read, for ``upcycle.json``.
    """
    reuse_freed_memory(REUSED_BYTES)
    calibration = Calibration(job, checkpoint, windows, folder, progress, samples)
    if joined_blueprint(job, folder) is None:  # else an earlier run was stopped after everything was decided
        calibration.run()
    return calibration.record
