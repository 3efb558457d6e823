"""Branch-Train-Merge's loop: branches are trained on their domains, merged, and branched again, in one call that can be repeated."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from upcycle.architectures.clean_settings import CONFIG, clean_file
from upcycle.architectures.dense.widened import refuse_masked
from upcycle.architectures.stock import build_config
from upcycle.branching.forest_record import ForestRecord
from upcycle.branching.plan_rounds import RoundStep, held_out_data, plan_rounds
from upcycle.branching.rounds_recipe import RoundsRecipe, parse_rounds_recipe, read_rounds_recipe
from upcycle.conversion.convert import run_recipe
from upcycle.conversion.jobs import job_of
from upcycle.errors import UpcycleError
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.locate import locate
from upcycle.files.output.locks import FolderLock
from upcycle.files.output.ownership import cannot_write, check_apart, real_path
from upcycle.files.records import RECIPE_FILE
from upcycle.models.load import load_model
from upcycle.progress import SILENT, Progress
from upcycle.trainers.checkpoints.prepare_model import tokenizer_of
from upcycle.trainers.data.batches import open_validation
from upcycle.trainers.data.data_check import check_data
from upcycle.trainers.data.open_domain import domain_contents
from upcycle.trainers.data.packed_attention import check_fits
from upcycle.trainers.distributed.launcher import launch_ranks
from upcycle.trainers.distributed.ranks import process_group
from upcycle.trainers.distributed.signals import INTERRUPTED
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.recipe.training_recipe import TrainRecipe, accumulation
from upcycle.trainers.run.loop import train
from upcycle.trainers.run.validation import validate

State = Literal["done", "next", "waiting"]


@dataclass(frozen=True)
class StepShown:
    """A step as it is shown: what it does, how far it is, and the losses of its model in nats per token, by domain."""

    step: str
    does: str
    state: State
    model: str
    losses: dict[str, float] | None


@dataclass(frozen=True)
class RoundsResult:
    """How the rounds ended: at their end, or ``stopped`` by a signal. ``seed`` has the seed's losses, by domain.

    ``model`` is the folder of the last model, ``None`` where some step is left.
    """

    output: str
    stopped: bool
    seed: dict[str, float] | None
    steps: list[StepShown]
    model: str | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def _silent(_: str) -> None:
    pass


def grow(
    recipe: RoundsRecipe | Mapping[str, Any] | str | Path,
    *,
    nproc: int | None = None,
    restart: bool = False,
    say: Callable[[str], None] = _silent,
    progress: Progress = SILENT,
) -> RoundsResult:
    """Carry out Branch-Train-Merge's rounds (Li et al., arXiv 2208.03306): branch, train each branch, merge, and again.

    The same call continues rounds that were stopped or killed: steps that are done are kept, a training run goes on from its
    newest checkpoint, and a conversion from its last whole layer. More rounds may be added to a recipe that is done.

    Args:
        recipe: a recipe, its keys, or its file.
        nproc: ranks that train every branch; ``None``: this process.
        restart: forget all steps, and begin again.
        say: called with each line of the report.
        progress: receives the progress of conversions.

    Raises:
        UpcycleError: with the reason; what is done stays.
    """
    recipe = _parsed(recipe)
    return _Rounds(recipe, say, progress).run(nproc, restart)


def look(recipe: RoundsRecipe | Mapping[str, Any] | str | Path) -> RoundsResult:
    """What the rounds would do, how far they are, and what is next; nothing is written.

    Raises:
        UpcycleError: the recipe is wrong, or the output is that of another one.
    """
    rounds = _Rounds(_parsed(recipe), _silent, SILENT)
    rounds.check_conversions()
    return rounds.result(time.monotonic(), stopped=False)


def _parsed(recipe: RoundsRecipe | Mapping[str, Any] | str | Path) -> RoundsRecipe:
    if isinstance(recipe, (str, Path)):
        return read_rounds_recipe(Path(recipe))
    return recipe if isinstance(recipe, RoundsRecipe) else parse_rounds_recipe(dict(recipe), "recipe")


class _Rounds:
    def __init__(self, recipe: RoundsRecipe, say: Callable[[str], None], progress: Progress) -> None:
        self.recipe, self.say, self.progress = recipe, say, progress
        self.steps = plan_rounds(recipe)
        self.seed = locate(recipe.source).path
        refuse_masked(self.seed, recipe.source)
        self.folder = real_path(recipe.output)
        check_apart(self.folder, self.seed, "the seed", inside=True)
        self.texts = cache(lambda: domain_contents(held_out_data(recipe)))
        self.record = ForestRecord(self.folder, self.seed, self.texts)

    def run(self, nproc: int | None, restart: bool) -> RoundsResult:
        started = time.monotonic()
        lock = FolderLock(self.folder, f"another upcycle grow is writing {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as fault:
            raise cannot_write(self.folder, fault) from None
        try:
            self.record = ForestRecord(
                self.folder, self.seed, self.texts
            )  # another call may have gone on since it was read
            if restart:
                self.record.begin_again(self.steps)
            self.check_conversions()
            self._check_trainings(nproc)
            self.record.write()
            write_text_whole(self.folder / RECIPE_FILE, self.recipe.dump())
            if self.record.seed_losses(self._held_out()) is None:
                began = time.monotonic()
                losses = self._measured(self.seed, held_out_data(self.recipe))
                self.record.keep_seed(losses, time.monotonic() - began, self._held_out())
            for step in self.steps:
                if not self.record.done(step):
                    self.say(f"next: {step.name}: {_does(step)}")
                    if not self._carry_out(step, nproc):
                        return self.result(started, stopped=True)
        finally:
            lock.release()
        return self.result(started, stopped=False)

    def result(self, started: float, stopped: bool) -> RoundsResult:
        """What is shown of all steps."""
        shown: list[StepShown] = []
        left = False
        for step in self.steps:
            finished = self.record.done(step)
            state: State = "done" if finished else "waiting" if left else "next"
            left = left or not finished
            losses = self.record.losses(step) if finished else None
            shown.append(StepShown(step.name, _does(step), state, str(step.model), losses))
        return RoundsResult(
            output=str(self.folder),
            stopped=stopped,
            seed=self.record.seed_losses(self._held_out()),
            steps=shown,
            model=None if left else str(self.steps[-1].model),
            seconds=time.monotonic() - started,
        )

    def _held_out(self) -> dict[str, Any]:
        """What decides the seed's losses, beside the seed: the text and how it is held out and packed."""
        trained = next(step.recipe for step in self.steps if isinstance(step.recipe, TrainRecipe))
        return {
            "length": trained.length,
            "data": held_out_data(self.recipe).model_dump(mode="json", exclude={"cache"}),
        }

    def _check_trainings(self, nproc: int | None) -> None:
        """Refuse what would stop a late run before the first one begins: rows, broken lines, a batch that ranks cannot divide.

        Raises:
            UpcycleError: names what is wrong.
        """
        runs = [step.recipe for step in self.steps if isinstance(step.recipe, TrainRecipe)]
        tokenizer, config = tokenizer_of(self.seed), build_config(clean_file(self.seed / CONFIG), str(self.seed))
        for run in runs:
            accumulation(run, nproc or 1)
        for length in sorted({run.length for run in runs}):
            check_fits(config, tokenizer, length)
            check_data(held_out_data(self.recipe), tokenizer, length, self.say)

    def check_conversions(self) -> None:
        """Plan all conversions that are left, with the seed in the place of its branches, which are of the same architecture.

        Raises:
            UpcycleError: a conversion is impossible, or a step that is done was done otherwise; names the step, and why.
        """
        left = [step for step in self.steps if not self.record.done(step)]
        for step in left:
            if isinstance(step.recipe, TrainRecipe):
                continue
            sources = [source.model_copy(update={"name": str(self.seed)}) for source in step.recipe.sources]
            try:
                job_of(step.recipe.model_copy(update={"source": str(self.seed), "sources": sources}))
            except UpcycleError as error:
                raise type(error)(f"{step.name}: {error.message}", hint=error.hint) from None

    def _carry_out(self, step: RoundStep, nproc: int | None) -> bool:
        """Do one step, measure its model, and record it; returns false where a signal stopped it."""
        began, again = time.monotonic(), self.record.restarts(step)
        if isinstance(step.recipe, TrainRecipe):
            if not self._train(step, step.recipe, nproc, again):
                return False
        else:
            step.folder.parent.mkdir(parents=True, exist_ok=True)
            run_recipe(step.recipe, step.folder, overwrite=True, restart=again, progress=self.progress)
        part = "tuning" if step.name == "tuned" else "training"
        data = held_out_data(self.recipe, part)
        chosen = [domain for domain in data.domains if domain.name in step.domains]
        losses = {}
        if step.model.name != "adapter":
            losses = self._measured(step.model, data.model_copy(update={"domains": chosen}))
        self.record.keep(step, losses, time.monotonic() - began)
        held_out = ", ".join(f"{name} {nats:.4f}" for name, nats in losses.items())
        self.say(f"done: {step.name}" + (f"; held out: {held_out}" if held_out else ""))
        return True

    def _train(self, step: RoundStep, recipe: TrainRecipe, nproc: int | None, again: bool) -> bool:
        if nproc is None:
            return not train(recipe, self.say, restart=again).stopped
        step.folder.parent.mkdir(parents=True, exist_ok=True)
        file = step.folder.with_name(f"{step.folder.name}.yaml")
        write_text_whole(file, recipe.dump())
        code = launch_ranks(["train", str(file), *(["--restart"] if again else [])], nproc)
        if code not in (0, INTERRUPTED):
            raise UpcycleError(
                f"{step.name}: training on {nproc} ranks ended with exit code {code}; its error stands above",
                hint=f"mend it and run the same command again; this step alone: upcycle train {file} --nproc {nproc}",
            )
        return code == 0

    def _measured(self, folder: Path, data: DataRecipe) -> dict[str, float]:
        """Held-out losses of a model, in nats per token; empty where nothing is held out."""
        recipes = [step.recipe for step in self.steps if isinstance(step.recipe, TrainRecipe)]
        held_out = open_validation(data, tokenizer_of(folder), length=recipes[0].length)
        if not held_out:
            return {}
        with process_group(recipes[0].timeout) as ranks:
            model = load_model(folder, torch.float32, ranks.device, experts="auto", training=True).requires_grad_(False)
            losses = validate(model, held_out, ranks)
            del model
        gc.collect()
        return losses


def _does(step: RoundStep) -> str:
    """A few words on what a step does."""
    if isinstance(step.recipe, TrainRecipe):
        steps = sum(map(step.recipe.steps_of, step.recipe.stages))
        return f"train {step.reads[0]} on {', '.join(step.domains)}, {steps:,} steps"
    models = len(step.reads) - 1
    how = "by posteriors" if step.recipe.calibration.texts and step.recipe.method == "branch_train_merge" else ""
    return " ".join(filter(None, [step.recipe.method, f"of {models} models", how]))
