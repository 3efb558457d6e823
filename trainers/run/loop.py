"""The training run: stages one after another, steps, reports, checkpoints, and how it stops."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.locate import locate
from upcycle.files.records import versions
from upcycle.files.user_paths import user_path
from upcycle.hardware.memory import keep_freed_memory
from upcycle.trainers.checkpoints.load_model import check_parent_tokens, parent_folder, save_config, tokenizer_of
from upcycle.trainers.checkpoints.read import SavedRun, open_checkpoint
from upcycle.trainers.checkpoints.write import save
from upcycle.trainers.data.batches import PackedBatch, check_data
from upcycle.trainers.distributed.ranks import Ranks, first_rank, joined
from upcycle.trainers.distributed.signals import StopSignals
from upcycle.trainers.forecast.flops import measured_peak
from upcycle.trainers.optimizing.optimizers import set_rates
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.recipe.training_recipe import TrainRecipe, parse_train_recipe, read_train_recipe
from upcycle.trainers.routing.bias_balance import loads
from upcycle.trainers.run.alarms import Alarm, Alarms, NanPolicy, expert_similarity
from upcycle.trainers.run.continuation import Change, accepted_changes, consequence, identity
from upcycle.trainers.run.reference_losses import reference_losses, reference_parent
from upcycle.trainers.run.run_folder import (
    check_run_folder,
    export_model,
    locked,
    open_run,
    save_batches,
    small_files,
)
from upcycle.trainers.run.run_start import agreed_checkpoint, check_model, check_room, check_shared, explained_writes
from upcycle.trainers.run.stage import Stage
from upcycle.trainers.run.step import StepResult
from upcycle.trainers.run.step_reports import Reports, StepReport, memory_in_use
from upcycle.trainers.run.validation import on_device, validate


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: ``stopped`` by a signal, or at its end. ``validation`` has the last losses in nats per token."""

    output: str
    step: int
    tokens: int
    stopped: bool
    loss: float
    validation: dict[str, float]
    checkpoint: str
    model: str | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return dict(vars(self))


def _silent(_: str) -> None:
    pass


def train(
    recipe: TrainRecipe | Mapping[str, Any] | str | Path, say: Callable[[str], None] = _silent, restart: bool = False
) -> TrainResult:
    """Train as one of the ranks that a launcher started, or alone.

    The same call continues a run that was stopped, from its newest checkpoint.

    Args:
        recipe: the run: a recipe, its keys, or its file.
        say: is told a line as it happens, on the first rank alone.
        restart: throw the run's checkpoints away and begin anew.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 end it after its current step, which is saved (``stopped`` in the result).

    Raises:
        UpcycleError: with the reason; complete checkpoints stay.
        KeyboardInterrupt: one of these signals came while no step ran; nothing is lost.
    """
    if isinstance(recipe, (str, Path)):
        recipe = read_train_recipe(Path(recipe))
    elif not isinstance(recipe, TrainRecipe):
        recipe = parse_train_recipe(dict(recipe), "recipe")
    speaks = say if first_rank() else _silent
    with StopSignals(speaks) as signals, joined(recipe.timeout) as ranks:
        return _Run(recipe, ranks, speaks, restart, signals).run()


class _Run:
    def __init__(
        self, recipe: TrainRecipe, ranks: Ranks, say: Callable[[str], None], restart: bool, signals: StopSignals
    ) -> None:
        self.signals = signals
        self.recipe, self.ranks, self.say = recipe, ranks, say
        self.folder = user_path(recipe.output)
        self.small = small_files(self.folder)
        self.origin = locate(recipe.model).path
        self.tokenizer = tokenizer_of(self.origin)
        self._check_inputs()
        self.identity = identity(recipe, self.origin)
        ranks.require_same("the recipe", {**self.identity, "batches": [recipe.micro_batch, recipe.global_batch]})
        ranks.require_same("versions", versions())
        self.step = self.tokens = 0
        self.loss = math.nan
        self.validation: dict[str, float] = {}
        self.changes: list[Change] = []
        self.history: list[dict[str, Any]] = []
        self.alarms = Alarms(recipe.alarms)
        self.policy = NanPolicy(recipe.bad_steps)
        self.stop = False
        self.restart, self.begun = restart, False
        self.reports: Reports | None = None
        self.checkpoint: Path | None = None

    def _check_inputs(self) -> None:
        """What is missing or broken, in a later stage, too, is found before the first step."""
        looked_at: list[DataRecipe] = []
        for stage in self.recipe.stages:
            data = stage.data or self.recipe.data
            if data not in looked_at:
                check_data(data, self.say)
                looked_at.append(data)
            parents = {reference_parent(data, self.origin)}
            if stage.distillation:
                parents.add(parent_folder(stage.distillation.parent, self.origin))
            for folder in filter(None, parents):
                try:
                    check_parent_tokens(tokenizer_of(folder), self.tokenizer, folder)
                except EnvironmentFault as error:
                    self.say(f"warning: {error.message}; its tokens cannot be compared with the student's")

    def run(self) -> TrainResult:
        begun = time.perf_counter()
        if self.recipe.keep_memory and not keep_freed_memory():
            self.say("warning: keep_memory: this system's C library is not glibc; freed memory is given back as always")
        check_run_folder(self.folder, self.origin, self.recipe.saving.export, self.ranks)
        with locked(self.folder, self.ranks):
            check_shared(self.folder, self.ranks)
            saved = None if self.restart else agreed_checkpoint(self.folder, self.ranks)
            if saved:
                self._continue(saved)
            else:
                check_model(self.origin, self.ranks)
            peak = self.recipe.log.peak_tflops
            dtype = getattr(torch, self.recipe.dtype)
            self.peak = peak * 1e12 if peak else measured_peak(self.ranks.device, dtype)
            with explained_writes(self.folder):
                self._stages(saved)
                model = None
                if self.recipe.saving.export and not self.stop:
                    model = export_model(self.folder, self.checkpoint, self.ranks, self.say)
            if self.reports:
                self.reports.close()
        assert self.checkpoint
        return TrainResult(
            output=str(self.folder),
            step=self.step,
            tokens=self.tokens,
            stopped=self.stop,
            loss=self.loss,
            validation=self.validation,
            checkpoint=str(self.checkpoint),
            model=str(model) if model else None,
            seconds=time.perf_counter() - begun,
        )

    def _begin(self) -> None:
        """The folder becomes this run's, once model, data and checkpoint were found to be right: a refusal changes nothing."""
        if not self.begun:
            self.begun = True
            self.reports = open_run(
                self.recipe, self.folder, self.origin, self.ranks, self.restart, self.say, self.step
            )
            self._record(self.changes)

    def _stages(self, saved: SavedRun | None) -> None:
        first = saved.state["stage"] if saved else 0
        for index in range(first, len(self.recipe.stages)):
            recipe = self.recipe.stages[index]
            resumed = saved is not None and saved.state["stage"] == index
            done = int(saved.state["stage_step"]) if saved and resumed else 0
            if done == self.recipe.steps_of(recipe):
                continue
            warnings: list[str] = []
            stage = Stage(self.recipe, recipe, self.origin, saved, resumed, self.ranks, self.tokenizer)
            if saved and resumed:
                warnings = stage.load_state(saved.state)
            elif saved and recipe.data == self.recipe.stages[index - 1].data:
                warnings = stage.stream.restore(saved.state["data"])
            warnings = [*warnings, *self._check_room(index, stage, done)]
            self._begin()
            self._warn(warnings)
            self.ranks.barrier()  # from here on all ranks finish their step
            with self.signals.steps():
                self._steps(index, stage, done)
            saved = open_checkpoint(self.checkpoint) if self.checkpoint else None
            stage.close()
            if self.stop:
                return

    def _steps(self, index: int, stage: Stage, done: int) -> None:
        name, steps = stage.stage.name, stage.steps
        self._describe(stage, done)
        if not done:
            self._first_validation(stage)
        for number in range(done, steps):
            begun = time.perf_counter()
            torch.manual_seed(_seed(self.recipe.seed, self.step, self.ranks.rank))
            stage.stepper.seed = _seed(self.recipe.seed, self.step, 0)
            rate = set_rates(stage.engine.optimizer, stage.schedule(number))
            batches = [on_device(stage.stream.next_batch(), self.ranks.device) for _ in range(stage.passes)]
            result = stage.stepper.step(stage.engine, batches, number / steps)
            self.step, self.tokens, self.loss = self.step + 1, self.tokens + self.recipe.tokens_per_step, result.loss
            self._report(name, stage, result, rate, time.perf_counter() - begun)
            self._check_finite(result, batches)
            received = int(self.ranks.maximum(self.signals.received or 0)[0])
            self.stop = bool(received)
            last = number + 1 == steps
            every = self.recipe.log.validation
            if stage.held_out and (last or (every and (number + 1) % every == 0)):
                self._validate(stage)
            if last or self.stop or self.step % self.recipe.saving.every == 0:
                self._save(index, stage, number + 1)
            if self.stop:
                name = signal.Signals(received).name
                self.say(f"stopped by {name} at step {self.step}, which is saved; the same command continues")
                return

    def _describe(self, stage: Stage, done: int) -> None:
        trained = sum(
            math.prod(stage.tensors.shape(tensor)) for tensor in stage.tensors.stock_tensors if tensor.trained
        )
        more = f", from step {done + 1}" if done else ""
        for warning in stage.warnings:
            self.say(f"warning: {warning}")
        self.say(
            f"stage {stage.stage.name}: {stage.steps} steps of {self.recipe.tokens_per_step:,} tokens, "
            f"{trained:,} weights train ({', '.join(stage.stage.train)}), {self.ranks.world_size} "
            f"rank{'s' * (self.ranks.world_size > 1)} x {stage.passes} pass{'es' * (stage.passes > 1)}{more}"
        )

    def _report(self, name: str, stage: Stage, result: StepResult, rate: float, seconds: float) -> None:
        if self.reports is None:
            return
        speed = self.recipe.tokens_per_step / seconds
        report = StepReport(
            step=self.step,
            steps=sum(map(self.recipe.steps_of, self.recipe.stages)),
            stage=name,
            loss=result.loss,
            parts=result.parts,
            learning_rate=rate,
            gradient_norm=result.gradient_norm,
            applied=result.applied,
            tokens=self.tokens,
            tokens_per_second=speed,
            utilisation=stage.flops.total * speed / (self.peak * self.ranks.world_size),
            memory=memory_in_use(self.ranks.device),
            loads=loads(result.counts),
            dropped=result.dropped,
        )
        self.reports.step(report, self.step % self.recipe.log.every == 0)
        found = self.alarms.loss(self.step, result.loss) if math.isfinite(result.loss) else []
        self._raise(found + self.alarms.loads(self.step, result.counts, stage.top_k))

    def _raise(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self.say(f"warning: {alarm.kind}: {alarm.message}")
            if self.reports:
                self.reports.record(
                    {"kind": "alarm", "step": alarm.step, "alarm": alarm.kind, "message": alarm.message}
                )

    def _first_validation(self, stage: Stage) -> None:
        """Where training starts, and where dynamic weights want it to go: the dense parent's losses on the same text."""
        parent = reference_parent(stage.stage.data or self.recipe.data, self.origin)
        if parent and stage.stream.lacks_reference:
            dtype = getattr(torch, self.recipe.dtype)
            self._refer(stage, reference_losses(parent, stage.model, stage.held_out, dtype, self.ranks))
        if stage.held_out and self.recipe.log.validation:
            self._validate(stage, observe=False)

    def _refer(self, stage: Stage, losses: dict[str, float]) -> None:
        stage.stream.refer_to(losses)
        self.say("reference, of the parent  " + "  ".join(f"{name} {nats:.4f}" for name, nats in losses.items()))
        if self.reports:
            content = {f"reference/{name}": nats for name, nats in losses.items()}
            self.reports.record({"kind": "reference", "step": self.step, "tokens": self.tokens, **content})

    def _validate(self, stage: Stage, observe: bool = True) -> None:
        self.validation = validate(stage.engine, stage.held_out, self.ranks, stage.stepper.control)
        text = "  ".join(f"{name} {nats:.4f}" for name, nats in self.validation.items())
        self.say(f"validation at step {self.step}  {text}")
        if self.reports:
            content = {f"validation/{name}": nats for name, nats in self.validation.items()}
            self.reports.record({"kind": "validation", "step": self.step, "tokens": self.tokens, **content})
        if observe and all(map(math.isfinite, self.validation.values())):
            stage.stream.observe(self.validation)

    def _check_finite(self, result: StepResult, batches: list[PackedBatch]) -> None:
        """Skip steps that are not finite, and after some in a row stop.

        Raises:
            UpcycleError: too many; what every rank read is saved.
        """
        norm = result.gradient_norm if result.applied else math.nan
        if self.policy.decide(result.loss, norm) != "stop":
            return
        path = save_batches(self.folder, self.step, self.ranks.rank, batches)
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "nothing was saved yet"
        raise UpcycleError(
            f"loss {result.loss} and gradient norm {result.gradient_norm} at step {self.step}, not finite "
            f"{self.recipe.bad_steps + 1} steps in a row; the batch is in {path}; {kept}",
            hint="lower learning_rate or clip, raise bad_steps, or mend the data: the run then continues from the checkpoint "
            "when it is given again with such changes",
        )

    def _save(self, index: int, stage: Stage, stage_step: int) -> None:
        if self.ranks.first:
            save_config(stage.model, self.small)
        state = {
            **stage.state(),
            "stage": index,
            "stage_step": stage_step,
            "optimizer_steps": stage.tensors.steps_taken,
            "tokens": self.tokens,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "validation": self.validation,
            "alarms": self.alarms.state(),
            "identity": self.identity,
            "changes": self.history,
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": versions(),
        }
        self._watch_similarity(stage)
        self.checkpoint = save(
            self.folder, self.step, stage.tensors, state, self.small, self.ranks, self.recipe.saving.keep
        )
        self.say(f"saved {self.checkpoint}")

    def _watch_similarity(self, stage: Stage) -> None:
        if not stage.top_k or self.step < self.recipe.alarms.identical_after:
            return
        cosines = {}
        for tensor in stage.tensors.stock_tensors:
            if tensor.name.endswith(".experts.gate_up_proj"):
                cosines[int(tensor.name.split(".")[2])] = expert_similarity(stage.tensors.weights(tensor))
        self._raise(self.alarms.similarities(self.step, cosines))

    def _check_room(self, index: int, stage: Stage, done: int) -> list[str]:
        saves = -(-(stage.steps - done) // self.recipe.saving.every)
        exports = self.recipe.saving.export and index + 1 == len(self.recipe.stages)
        size = sum(spec.nbytes for spec in SafetensorsFolder(self.origin).specs.values()) if exports else 0
        warning = check_room(self.folder, stage.tensors, saves, self.recipe.saving.keep, size, self.ranks)
        return [warning] if warning else []

    def _warn(self, texts: list[str]) -> None:
        for text in texts:
            self.say(f"warning: {text}")
            if self.reports:
                self.reports.record({"kind": "warning", "step": self.step, "message": text})

    def _record(self, changes: list[Change]) -> None:
        """What is another from here on: in the log, and in every checkpoint to come."""
        for change in changes:
            self.say(f"changed: {change}")
            made = {"step": self.step, "key": change.key, "was": change.was, "now": change.now}
            self.history = [*self.history, made]
            if self.reports:
                self.reports.record({"kind": "change", **made})

    def _continue(self, saved: SavedRun) -> None:
        self.changes = accepted_changes(saved, self.recipe, self.identity["model"])
        self.step, self.tokens = saved.step, int(saved.state["tokens"])
        self.loss = saved.state["loss"] if saved.state["loss"] is not None else math.nan
        self.validation, self.checkpoint = saved.state["validation"], saved.folder
        self.history = saved.state.get("changes", [])
        self.alarms.load_state(saved.state["alarms"])
        world_size = int(saved.state["world"])
        self.say(f"continuing {saved.folder}" + (f", saved by {world_size} ranks" if world_size > 1 else ""))
        if text := consequence(saved, self.recipe):
            self.say(text)


def _seed(seed: int, step: int, rank: int) -> int:
    """Noise of a step depends on nothing before it, so that a resumed run draws the same."""
    return (seed * 1_000_003 + step) * 65_537 + rank
