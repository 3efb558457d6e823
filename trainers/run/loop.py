"""The training run: stages one after another, their steps, checkpoints, and how it stops."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures.dense.widened import refuse_masked
from upcycle.architectures.module_paths import module_paths_of
from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.locate import locate
from upcycle.files.records import versions
from upcycle.files.user_paths import user_path
from upcycle.hardware.memory import keep_freed_memory, unmap_large_blocks
from upcycle.notebook import HtmlShown
from upcycle.trainers.checkpoints.prepare_model import (
    check_parent_tokens,
    parent_folder,
    predicts_masked,
    save_config,
    tokenizer_of,
)
from upcycle.trainers.checkpoints.read import SavedRun, open_checkpoint
from upcycle.trainers.checkpoints.write import save
from upcycle.trainers.data.chat_templates import kept_template
from upcycle.trainers.data.data_check import check_data
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation.preference import check_preferences
from upcycle.trainers.distributed.ranks import Ranks, first_rank, process_group
from upcycle.trainers.distributed.signals import StopSignals
from upcycle.trainers.forecast.flops import measured_peak
from upcycle.trainers.optimizing.optimizers import set_rates
from upcycle.trainers.pictures.pictures import pictures_of
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.recipe.training_recipe import TrainRecipe, parse_train_recipe, read_train_recipe
from upcycle.trainers.routing.stock_routers import moe_layers
from upcycle.trainers.run.alarms import NanPolicy, expert_similarity
from upcycle.trainers.run.continuation import Change, accepted_changes, consequence, run_identity
from upcycle.trainers.run.out_of_memory import lowered_by_keys
from upcycle.trainers.run.reference_losses import reference_losses, reference_parent
from upcycle.trainers.run.run_folder import (
    check_run_folder,
    export_model,
    locked,
    open_run,
    save_batches,
    small_files,
)
from upcycle.trainers.run.run_progress import RunProgress
from upcycle.trainers.run.run_start import agreed_checkpoint, check_model, check_room, check_shared, explained_writes
from upcycle.trainers.run.stage import Stage, check_objective
from upcycle.trainers.run.step_result import StepResult
from upcycle.trainers.run.unmasking import check_masks
from upcycle.trainers.run.validation import on_device, validate

# of all experts of a layer: stacked as stock classes have them, or packed as upcycle's own has
_FIRST_PROJECTIONS = (".experts.gate_up_proj", ".experts.gate_up", ".experts.up")


@dataclass(frozen=True)
class TrainResult(HtmlShown):
    """How a run ended: at its end, or ``stopped`` by a signal. ``validation`` has the last losses in nats per token.

    ``model`` is the folder that was exported: that of the model, or of the adapter that was trained.
    """

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
    """Train a model, as one of the ranks that a launcher started or alone.

    The same call continues a run that was stopped, from its newest checkpoint.

    Args:
        recipe: a recipe, its keys, or its file.
        say: called with each line of the run's report, on the first rank alone.
        restart: discard the run's checkpoints and begin again.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 end the run after its current step, which is saved (``stopped`` in the result).

    Raises:
        UpcycleError: with the reason; complete checkpoints stay.
        KeyboardInterrupt: one of these signals came while no step ran; nothing is lost.
    """
    if isinstance(recipe, (str, Path)):
        recipe = read_train_recipe(Path(recipe))
    elif not isinstance(recipe, TrainRecipe):
        recipe = parse_train_recipe(dict(recipe), "recipe")
    first_says = say if first_rank() else _silent
    with (
        StopSignals(first_says) as signals,
        process_group(recipe.timeout) as ranks,
        lowered_by_keys(recipe, ranks),
    ):
        return _Run(recipe, ranks, first_says, restart, signals).run()


class _Run:
    """One call of :func:`train` on one rank."""

    def __init__(
        self, recipe: TrainRecipe, ranks: Ranks, say: Callable[[str], None], restart: bool, signals: StopSignals
    ) -> None:
        self.signals = signals
        self.recipe, self.ranks, self.say = recipe, ranks, say
        self.folder = user_path(recipe.output)
        self.small = small_files(self.folder)
        self.origin = locate(recipe.model).path
        self.tokenizer, self.pictures = tokenizer_of(self.origin), pictures_of(self.origin)
        self._check_inputs()
        self.identity = run_identity(recipe, self.origin)
        ranks.require_same("the recipe", {**self.identity, "batches": [recipe.micro_batch, recipe.global_batch]})
        ranks.require_same("versions", versions())
        self.progress = RunProgress(recipe, say, ranks.world_size)
        self.changes: list[Change] = []  # of the recipe, since the checkpoint that is continued
        self.policy = NanPolicy(recipe.bad_steps)
        self.stop = False
        self.restart, self.begun = restart, False
        self.checkpoint: Path | None = None

    def _check_inputs(self) -> None:
        """Read all data and find all parents, of later stages too, so that what is missing is refused before the first step."""
        checked: list[tuple[DataRecipe, list[str]]] = []
        check_masks(self.recipe, self.origin)
        self.template = kept_template(
            self.tokenizer,
            ((self.recipe.data_key(each), self.recipe.data_of(each).chat_template) for each in self.recipe.stages),
        )
        masks = predicts_masked(self.origin)
        for stage in self.recipe.stages:
            check_objective(self.recipe, stage, masks)
            data = self.recipe.data_of(stage)
            preferences = next((found for before, found in checked if before == data), None)
            if preferences is None:
                preferences = check_data(
                    data,
                    self.tokenizer,
                    self.recipe.length,
                    self.say,
                    self.ranks.rank,
                    masks,
                    self.pictures,
                    self.recipe.data_key(stage),
                )
                checked.append((data, preferences))
            check_preferences(stage, preferences)
            parents = {reference_parent(data, self.origin)}
            if stage.distillation:
                parents.add(parent_folder(stage.distillation.parent, self.origin))
            for folder in filter(None, parents):
                refuse_masked(folder, str(folder))  # without its masks, it would teach what random weights say
                try:
                    check_parent_tokens(tokenizer_of(folder), self.tokenizer, folder)
                except EnvironmentFault as error:
                    self.say(f"warning: {error.message}; its tokens cannot be compared with the student's")

    def run(self) -> TrainResult:
        """Train until the last stage's end, or until a signal."""
        started = time.perf_counter()
        set_allocator(self.recipe, self.ranks.world_size, self.say)
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
            if self.progress.reports:
                self.progress.reports.close()
        assert self.checkpoint
        return TrainResult(
            output=str(self.folder),
            step=self.progress.step,
            tokens=self.progress.tokens,
            stopped=self.stop,
            loss=self.progress.loss,
            validation=self.progress.validation,
            checkpoint=str(self.checkpoint),
            model=str(model) if model else None,
            seconds=time.perf_counter() - started,
        )

    def _continue(self, saved: SavedRun) -> None:
        self.changes = accepted_changes(saved, self.recipe, self.identity["model"])
        self.progress.restore(saved)
        self.checkpoint = saved.folder
        world_size = int(saved.state["world"])
        self.say(f"continuing {saved.folder}" + (f", saved by {world_size} ranks" if world_size > 1 else ""))
        if text := consequence(saved, self.recipe):
            self.say(text)

    def _begin(self) -> None:
        """Make the folder this run's. It comes after model, data and checkpoint were checked: a refusal changes nothing."""
        if not self.begun:
            self.begun = True
            self.progress.reports = open_run(
                self.recipe,
                self.folder,
                self.origin,
                self.ranks,
                self.restart,
                self.say,
                self.progress.step,
                self.template,
            )
            self.progress.record_changes(self.changes)

    def _stages(self, saved: SavedRun | None) -> None:
        first = saved.state["stage"] if saved else 0
        for index in range(first, len(self.recipe.stages)):
            recipe = self.recipe.stages[index]
            resumed = saved is not None and saved.state["stage"] == index
            done = int(saved.state["stage_step"]) if saved and resumed else 0
            if done == self.recipe.steps_of(recipe):
                continue
            warnings: list[str] = []
            stage = Stage(self.recipe, recipe, self.origin, saved, resumed, self.ranks, self.tokenizer, self.pictures)
            if saved and resumed:
                warnings = stage.load_state(saved.state)
            elif saved and recipe.data == self.recipe.stages[index - 1].data:
                # The same data go on where the stage before stopped reading.
                warnings = stage.stream.restore(saved.state["data"])
            warnings = [*warnings, *self._check_room(index, stage, done)]
            self._begin()
            self.progress.warn(warnings)
            self.ranks.barrier()  # from here on, every rank finishes the step that it is in
            with self.signals.steps():
                self._steps(index, stage, done)
            saved = open_checkpoint(self.checkpoint) if self.checkpoint else None
            stage.close()
            if self.stop:
                return

    def _steps(self, index: int, stage: Stage, done: int) -> None:
        progress = self.progress
        progress.describe(stage, done)
        stage.unmask(done)
        if not done:
            self._first_validation(stage)
        for number in range(done, stage.steps):
            started = time.perf_counter()
            torch.manual_seed(_seed(self.recipe.seed, progress.step, self.ranks.rank))
            stage.stepper.seed = _seed(self.recipe.seed, progress.step, 0)
            stage.stepper.control.step = number
            rate = set_rates(stage.engine.optimizer, stage.schedule(number))
            batches = [on_device(stage.stream.next_batch(), self.ranks.device) for _ in range(stage.passes)]
            progress.warn(self.pictures.news() if self.pictures else ())
            result = stage.stepper.step(stage.engine, batches, number / stage.steps)
            progress.count_step(result)
            stage.unmask(number + 1)
            seconds = time.perf_counter() - started
            progress.report_step(stage, result, rate, seconds, self.peak, self.ranks.device)
            self._check_finite(result, batches)
            # A signal may have reached some ranks alone: all of them stop after the same step.
            received = int(self.ranks.maximum(self.signals.received or 0)[0])
            self.stop = bool(received)
            last = number + 1 == stage.steps
            every = self.recipe.log.validation
            if stage.held_out and (last or (every and (number + 1) % every == 0)):
                self._validate(stage)
            if last or self.stop or progress.step % self.recipe.saving.every == 0:
                self._save(index, stage, number + 1)
            if last:
                progress.report_passes(stage.stream.passes)
            if self.stop:
                name = signal.Signals(received).name
                self.say(f"stopped by {name}; step {progress.step} is saved; to continue, run the same command again")
                return

    def _first_validation(self, stage: Stage) -> None:
        """Measure the losses that a stage starts from, and those of the dense parent if dynamic weights need them."""
        parent = reference_parent(self.recipe.data_of(stage.stage_recipe), self.origin)
        if parent and stage.stream.lacks_reference:
            dtype = getattr(torch, self.recipe.dtype)
            losses = reference_losses(parent, stage.model, stage.held_out, dtype, self.ranks, stage.divides)
            stage.stream.refer_to(losses)
            self.progress.report_reference(losses)
        if stage.held_out and self.recipe.log.validation:
            self._validate(stage, observe=False)

    def _validate(self, stage: Stage, observe: bool = True) -> None:
        losses = validate(stage.engine, stage.held_out, self.ranks, stage.stepper.control)
        self.progress.report_validation(losses)
        if observe and all(map(math.isfinite, losses.values())):
            stage.stream.observe(losses)

    def _check_finite(self, result: StepResult, batches: list[PackedBatch]) -> None:
        """Count steps whose loss or gradient is not finite, and stop the run after too many of them in a row.

        Raises:
            UpcycleError: there were too many; what every rank read in the last one is saved.
        """
        norm = result.gradient_norm if result.applied else math.nan
        if self.policy.decide(result.loss, norm) != "stop":
            return
        path = save_batches(self.folder, self.progress.step, self.ranks.rank, batches)
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "nothing was saved yet"
        raise UpcycleError(
            f"loss {result.loss} and gradient norm {result.gradient_norm} at step {self.progress.step}, not finite "
            f"{self.recipe.bad_steps + 1} steps in a row; the batch is in {path}; {kept}",
            hint="lower learning_rate or clip, raise bad_steps, or mend the data; then run the same command again to continue "
            "from the checkpoint",
        )

    def _save(self, index: int, stage: Stage, stage_step: int) -> None:
        if self.ranks.first:
            save_config(stage.model, self.small)
        state = {
            **stage.state(),
            **self.progress.state(),
            "stage": index,
            "stage_step": stage_step,
            "optimizer_steps": stage.tensors.steps_taken,
            "identity": self.identity,
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": versions(),
        }
        self._watch_similarity(stage)
        self.checkpoint = save(
            self.folder, self.progress.step, stage.tensors, state, self.small, self.ranks, self.recipe.saving.keep
        )
        self.say(f"saved {self.checkpoint}")

    def _watch_similarity(self, stage: Stage) -> None:
        """Raise an alarm if experts are still copies of each other. All ranks take part in gathering the weights."""
        if not stage.top_k or self.progress.step < self.recipe.alarms.identical_after:
            return
        cosines, paths = {}, module_paths_of(stage.model.config)
        layers = moe_layers(stage.model)
        counts = {layer.index: layer.count for layer in layers}
        blocks = {id(layer.block): layer.index for layer in layers}
        places = {name: blocks[id(block)] for name, block in stage.model.named_modules() if id(block) in blocks}
        for tensor in stage.tensors.stock_tensors:
            layer = places.get(tensor.name.partition(".experts.")[0], paths.layer_of(tensor.name))
            if layer in counts and tensor.name.endswith(_FIRST_PROJECTIONS):
                weights = stage.tensors.weights(tensor)
                if len(weights) % counts[layer] == 0:  # packed experts of unequal widths are not copies
                    cosines[layer] = expert_similarity(weights.view(counts[layer], -1))
        self.progress.raise_alarms(self.progress.alarms.similarities(self.progress.step, cosines))

    def _check_room(self, index: int, stage: Stage, done: int) -> list[str]:
        saves = -(-(stage.steps - done) // self.recipe.saving.every)
        exports = self.recipe.saving.export and index + 1 == len(self.recipe.stages) and self.recipe.adapter is None
        size = sum(spec.nbytes for spec in SafetensorsFolder(self.origin).specs.values()) if exports else 0
        warning = check_room(self.folder, stage.tensors, saves, self.recipe.saving.keep, size, self.ranks)
        return [warning] if warning else []


def set_allocator(recipe: TrainRecipe, world_size: int, say: Callable[[str], None]) -> None:
    """Keep freed memory if the recipe says so; otherwise give it back where ranks gather each other's weights all the time."""
    if recipe.keep_memory:
        if not keep_freed_memory():
            say("warning: keep_memory has no effect: it needs glibc, and this system has another C library")
    elif world_size > 1 and recipe.zero_stage(world_size) == 3:
        unmap_large_blocks()


def _seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step's noise. It depends on nothing before the step, so that a continued run draws the same."""
    return (seed * 1_000_003 + step) * 65_537 + rank
