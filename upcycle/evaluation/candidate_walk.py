"""Runs many conversions of one model through its layers side by side, and computes what they have in common only once.

No checkpoint is written. Each candidate's residual streams, of the calibration tokens and of the evaluation tokens, are in files. A
layer is decided by the same code as in a conversion, and then applied to both. Up to its first MoE layer, a candidate is the dense
model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import kl_div, log_softmax

from upcycle.calibration.decide_layer import (
    ActiveNeurons,
    Outputs,
    activations_of,
    decide_layer,
    outputs_of,
    targets_of,
    weights_behind_norm,
)
from upcycle.ffn.activations import (
    HELD_OUT_EVERY,
    Activations,
    ExpertActivations,
    TokenActivations,
    most_contributing,
)
from upcycle.ffn.refit import Applied, Routing, fit_down
from upcycle.ffn.router_capture import ExpertMap, of_largest
from upcycle.files.formats.token_files import TokenFile, write_together
from upcycle.formatting import duration
from upcycle.hardware.memory import available_memory, reuse_freed_memory
from upcycle.models.layer_runner import LayerRunner, logits_of
from upcycle.models.stock_model import dense_reader, skeleton
from upcycle.planning.cost import CALIBRATION_BATCH_TOKENS, MOST_CACHE_BYTES, REUSED_BYTES
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.ffn.blueprint import LayerBlueprint
    from upcycle.ffn.feed_forward import FeedForward
    from upcycle.planning.expert_job import ExpertJob

_LOGIT_BYTES = 1 << 27  # of the fp32 logits of a batch, at most
Targets = Callable[[], Iterator[torch.Tensor]]


class OracleRouting(Routing):
    """Chooses the experts whose outputs are largest, which no router can surpass and no checkpoint can hold."""

    def __init__(self, blueprint: LayerBlueprint, ffn: FeedForward) -> None:
        super().__init__(blueprint, ffn)
        self._map = ExpertMap(blueprint, ffn)

    def chosen(self, batch: TokenActivations) -> torch.Tensor:
        """Return ``[t, E]``, 1 for the k experts that contribute most to a token and 0 for others."""
        return of_largest(self._map.energies(batch.hidden), self._top_k)


class StaticPruning:
    """Runs the same neurons for every token: those that contribute most on the calibration text. Routing must beat this baseline."""

    def __init__(self, activations: Activations, count: int) -> None:
        self._kept = most_contributing(activations, count)
        self.down = activations.ffn.down.float()[:, self._kept]
        self.bias = None if activations.ffn.down_bias is None else activations.ffn.down_bias.float()

    def active(self, batch: TokenActivations) -> torch.Tensor:
        """Return the activations of the kept neurons, fp32 ``[t, count]``."""
        return batch.hidden.index_select(1, self._kept)


@dataclass
class Candidate:
    """Holds one way to convert and its measurements.

    Attributes:
        job: the conversion.
        active: the fraction of the FFN neurons that run per token, all layers together.
        label: its active fraction, method, router, refit and baseline, by which candidates are told apart.
        baseline: ``static`` or ``oracle``, which only this comparison can run; None: a conversion.
        seconds: the time that deciding and running its layers took.
        captured: the router's share of what an oracle's choices contribute, per MoE layer.
        nats: the mean loss per token, per domain.
        kl: the mean KL(dense || candidate) of next-token distributions, in nats.
    """

    job: ExpertJob
    active: float
    label: str
    baseline: str | None = None
    seconds: float = 0.0
    captured: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    kl: float = 0.0


@dataclass(frozen=True)
class Texts:
    """Holds token ids ``[N, W]`` to calibrate on, and for each domain token ids to measure on.

    ``unseen`` are the last domains of ``evaluation``, of whose kinds nothing was calibrated on: no candidate is chosen by them.
    """

    calibration: torch.Tensor
    evaluation: dict[str, torch.Tensor]
    unseen: tuple[str, ...] = ()

    @property
    def seen(self) -> int:
        """The number of domains that candidates are chosen by."""
        return len(self.evaluation) - len(self.unseen)


class Walk:
    """Runs candidates side by side.

    Args:
        checkpoint: the dense model.
        dtype: dtype of the converted weights.
        texts: windows of tokens, all of one length.
        folder: folder for token files; the caller removes it.
        progress: receives the progress.
        workers: how many candidates run at a time, sharing torch's threads; each needs the memory of a conversion.
        importance: what another walk over the same texts has measured, by number of experts and layer; it gets what this one does.
    """

    def __init__(
        self,
        checkpoint: DenseCheckpoint,
        dtype: str,
        texts: Texts,
        folder: Path,
        progress: Progress,
        workers: int = 1,
        importance: dict[int, dict[int, torch.Tensor]] | None = None,
    ) -> None:
        self._checkpoint, self._dtype, self._texts = checkpoint, dtype, texts
        self._folder, self._progress = folder, progress
        self._window = texts.calibration.shape[1]
        per_batch = max(1, min(CALIBRATION_BATCH_TOKENS // self._window, len(texts.calibration) // HELD_OUT_EVERY))
        self._batch = per_batch * self._window
        self._runners = [LayerRunner(checkpoint, dtype, self._window) for _ in range(workers)]
        self._cache_bytes = min(MOST_CACHE_BYTES, available_memory() // 4) // workers
        self._ids = {"calibration": texts.calibration, "evaluation": torch.cat(list(texts.evaluation.values()))}
        self._outside: Any = None
        self._importance = {} if importance is None else importance
        self.dense_seconds = 0.0

    def run(self, candidates: Sequence[Candidate]) -> list[float]:
        """Run all layers, store what is measured in the candidates, and return the dense model's nats per token for each domain."""
        reuse_freed_memory(REUSED_BYTES)
        if self._progress.listens:
            self._foretell(candidates)
        threads, workers = torch.get_num_threads(), len(self._runners)
        pool = ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(max(1, threads // workers)))
        try:
            return self._run(candidates, pool)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _foretell(self, candidates: Sequence[Candidate]) -> None:
        """Say about how long all candidates take, from what deciding a layer of one of them takes on this machine."""
        from upcycle.evaluation.forecast.forecast import calibrating_seconds

        job, read = candidates[0].job, self._ids["calibration"].numel()
        if (one := calibrating_seconds(job, read)) is None:
            return
        share = 1 + self._ids["evaluation"].numel() / read
        took = duration(one * share * len(candidates))
        self._progress.tell(f"comparing {len(candidates)} splits, layer by layer, on {read:,} tokens: about {took}")

    def _run(self, candidates: Sequence[Candidate], pool: ThreadPoolExecutor) -> list[float]:
        layers = self._checkpoint.config.num_hidden_layers
        importance = self._importance_of([c for c in candidates if c.job.method.needs_gradients])
        names = ["dense", *map(str, range(len(candidates)))]
        runner, idle = self._runners[0], SimpleQueue[LayerRunner]()
        for each in self._runners:
            idle.put(each)
        self.dense_seconds = 0.0
        for what, ids in self._ids.items():
            self._stream("dense", what, 0).write(map(runner.embed, ids.flatten().split(self._batch)))
        with self._progress.phase("comparing", layers * (len(candidates) + 1)):
            for index in range(layers):
                ffn = self._checkpoint.feed_forward(index, self._dtype)
                begin = any(index == _first(candidate) for candidate in candidates)
                with ExitStack() as loaded, torch.no_grad():
                    for each in self._runners:
                        loaded.enter_context(each.loaded(index))
                    started = time.monotonic()
                    for what in self._ids:
                        states = self._stream("dense", what, index).blocks(self._batch)
                        files = [self._stream("dense", what, index + 1), *self._made(what)]
                        write_together(files, (runner.outcome(index, block)[: len(files)] for block in states))
                        if begin:
                            self._attention(runner, index, "dense", what)
                    self.dense_seconds += time.monotonic() - started
                    self._progress.advance()

                    def one(number: int, index: int = index, ffn: FeedForward = ffn) -> None:
                        given = importance.get(id(candidates[number]), {}).get(index)
                        taken = idle.get()
                        try:
                            with torch.no_grad():
                                self._layer(taken, index, ffn, f"{number}", candidates[number], given)
                        finally:
                            idle.put(taken)

                    for _ in pool.map(one, range(len(candidates))):
                        self._progress.advance()
                for name in names:
                    for what in self._ids:
                        self._stream(name, what, index).release()
        (dense, _), *measured = self._measure(names, layers, pool)
        for candidate, (nats, kl) in zip(candidates, measured, strict=True):
            candidate.nats, candidate.kl = nats, kl
            candidate.seconds += self.dense_seconds
        for name in names:
            for what in self._ids:
                self._stream(name, what, layers).release()
        return dense

    def _stream(self, name: str, what: str, index: int) -> TokenFile:
        return self._file(name, f"{what}.{index}")

    def _file(self, name: str, what: str) -> TokenFile:
        folder = self._folder / name  # one per candidate, since a released file is reused by the next one in its folder
        folder.mkdir(exist_ok=True)
        return TokenFile(folder / what, self._checkpoint.config.hidden_size)

    def _importance_of(self, candidates: Sequence[Candidate]) -> dict[int, dict[int, torch.Tensor]]:
        """Return by candidate's identity what the neurons of every layer matter to as many kinds of text as it has experts."""
        from upcycle.calibration.neuron_importance import measure_importance

        clusters = {id(candidate): candidate.job.shape.experts for candidate in candidates}
        if fresh := sorted(set(clusters.values()) - self._importance.keys()):
            runner, texts, job = self._runners[0], self._texts.calibration, candidates[0].job
            self._importance |= measure_importance(
                self._folder, runner, self._checkpoint, texts, fresh, job, self._progress
            )
        return {key: self._importance[count] for key, count in clusters.items()}

    def _layer(
        self,
        runner: LayerRunner,
        index: int,
        ffn: FeedForward,
        name: str,
        candidate: Candidate,
        importance: torch.Tensor | None,
    ) -> None:
        """Decide one layer of one candidate, and run both texts through it."""
        first = _first(candidate)
        if index < first:
            return
        if index not in candidate.job.shape.moe_layers:
            for what in self._ids:
                states = self._stream(name, what, index).blocks(self._batch)
                self._stream(name, what, index + 1).write(runner.whole(index, block) for block in states)
            return
        started = time.monotonic()
        source = "dense" if index == first else name
        if index > first:
            self._attention(runner, index, name, "calibration")
        inputs, residual = (self._file(source, f"{part}.calibration") for part in ("x", "residual"))
        weights, targets = None, targets_of(self._stream("dense", "calibration", index + 1), residual, self._batch)
        for made in self._made("calibration"):
            weights = weights_behind_norm(made, self._batch, self._checkpoint.config.rms_norm_eps)
            targets = outputs_of(made, self._batch)
        activations = activations_of(ffn, inputs, self._batch, importance, self._cache_bytes, weights=weights)
        decided = self._decide(candidate, ffn, activations, targets)
        self._continue(runner, name, "calibration", index, decided.on_calibration(), residual)
        candidate.seconds += time.monotonic() - started
        if index > first:
            self._attention(runner, index, name, "evaluation")
        inputs, residual = (self._file(source, f"{part}.evaluation") for part in ("x", "residual"))
        outputs = decided.of(activations_of(ffn, inputs, self._batch))
        self._continue(runner, name, "evaluation", index, outputs, residual)

    def _made(self, what: str) -> list[TokenFile]:
        """Return the file of what the dense model's FFN makes of a text, where candidates are fitted to that; else nothing."""
        fitted = what == "calibration" and self._runners[0].norms_output
        return [self._file("dense", f"made.{what}")] if fitted else []

    def _attention(self, runner: LayerRunner, index: int, name: str, what: str) -> None:
        """Write the inputs of the layer's FFN, and the residual to which its output is added, to the files ``x`` and ``residual``."""
        states = self._stream(name, what, index).blocks(self._batch)
        files = [self._file(name, f"{part}.{what}") for part in ("x", "residual")]
        write_together(files, (runner.around(index, block) for block in states))

    def _decide(self, candidate: Candidate, ffn: FeedForward, activations: Activations, targets: Targets) -> Outputs:
        """Decide the layer and return what it computes."""
        if candidate.baseline == "static":
            shape = candidate.job.shape
            kept = (shape.shared + shape.top_k) / (shape.shared + shape.experts) * ffn.intermediate_size
            static = StaticPruning(activations, round(kept))
            return _fitted(static, candidate, ffn, activations, targets)
        if candidate.baseline == "oracle":
            from upcycle.calibration.decide_layer import decide

            oracle = OracleRouting(decide(candidate.job, ffn, activations), ffn)
            candidate.captured.append(1.0)
            return _fitted(oracle, candidate, ffn, activations, targets)
        _, report, outputs = decide_layer(candidate.job, ffn, activations, targets)
        candidate.captured += [report["captured"]] if "captured" in report else []
        return outputs

    def _continue(
        self,
        runner: LayerRunner,
        name: str,
        what: str,
        index: int,
        outputs: Iterator[torch.Tensor],
        residual: TokenFile,
    ) -> None:
        """Write the candidate's stream after the layer."""
        pairs = zip(residual.blocks(self._batch), outputs, strict=True)
        self._stream(name, what, index + 1).write(before + runner.added(index, made) for before, made in pairs)

    def _measure(self, names: Sequence[str], layers: int, pool: ThreadPoolExecutor) -> list[tuple[list[float], float]]:
        """Return, for the dense model and each candidate, nats per token of each domain, and the mean KL(dense || it) of the seen."""
        self._outside = self._outside or skeleton(
            self._checkpoint.raw_config, dense_reader(self._checkpoint, self._dtype)(None)
        )
        ids, window = self._ids["evaluation"], self._window
        domains = torch.repeat_interleave(
            torch.arange(len(self._texts.evaluation)), torch.tensor([len(v) for v in self._texts.evaluation.values()])
        )
        seen = sum(len(windows) for windows in list(self._texts.evaluation.values())[: self._texts.seen])
        step = max(1, _LOGIT_BYTES // (4 * window * self._checkpoint.config.vocab_size)) * window
        losses, kl = torch.zeros(len(names), len(ids), dtype=torch.float64), [0.0] * len(names)
        streams = zip(*(self._stream(name, "evaluation", layers).blocks(step) for name in names), strict=True)
        for first, (reference, *others) in zip(range(0, len(ids), step // window), streams, strict=True):
            rows = ids[first : first + len(reference) // window]
            p = self._log_softmax(reference, rows)

            known = max(0, seen - first)  # of these rows

            def judged(states: torch.Tensor, rows: torch.Tensor = rows, p: torch.Tensor = p, known: int = known) -> Any:
                q = p if states is reference else self._log_softmax(states, rows)  # noqa: B023 - used in this round
                nats = -q.gather(2, rows[:, 1:, None]).double().mean((1, 2))
                return nats, kl_div(q[:known], p[:known], log_target=True, reduction="sum").item()

            for number, (nats, divergence) in enumerate(pool.map(judged, (reference, *others))):
                losses[number, first : first + len(rows)] = nats
                kl[number] += divergence
        of_domain = [domains == domain for domain in range(len(self._texts.evaluation))]
        tokens = seen * (window - 1)
        return [
            ([mine[one].mean().item() for one in of_domain], max(0.0, kl[n] / tokens)) for n, mine in enumerate(losses)
        ]

    def _log_softmax(self, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the log probabilities ``[N, W - 1, V]`` of next tokens, given the last hidden states of windows."""
        with torch.no_grad():
            logits = logits_of(self._outside, self._checkpoint, states.view(len(rows), self._window, -1))
            return log_softmax(logits[:, :-1], -1)


def _fitted(
    applied: Applied, candidate: Candidate, ffn: FeedForward, activations: Activations, targets: Targets
) -> Outputs:
    """Return a baseline with its down projection after the same refit and rounding as the candidates'."""
    active = ExpertActivations(activations, applied.active)
    if candidate.job.refit != "down":
        return ActiveNeurons(applied, active, applied.down)
    down, _ = fit_down(applied, active, targets())
    return ActiveNeurons(applied, active, down.to(ffn.down.dtype).float())


def _first(candidate: Candidate) -> int:
    """Return the first layer in which a candidate differs from the dense model."""
    return min(candidate.job.shape.moe_layers)


def ratio(nats: Sequence[float], dense: Sequence[float]) -> float:
    """Return the geometric mean over domains of perplexity relative to the dense model's, from nats per token."""
    return math.exp(sum(mine - theirs for mine, theirs in zip(nats, dense, strict=True)) / len(dense))
