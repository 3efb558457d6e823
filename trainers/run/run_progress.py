"""How far a run has come, and everything that it reports on the way: lines, log.jsonl, trackers, alarms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from upcycle.trainers.checkpoints.read import SavedRun
from upcycle.trainers.recipe.training_recipe import TrainRecipe
from upcycle.trainers.routing.bias_balance import loads
from upcycle.trainers.run.alarms import Alarm, Alarms
from upcycle.trainers.run.continuation import Change
from upcycle.trainers.run.stage import Stage
from upcycle.trainers.run.step_reports import Reports, StepReport, memory_in_use
from upcycle.trainers.run.step_result import StepResult


class RunProgress:
    """The counters of a run, which checkpoints keep, and its reports, which only the first rank has.

    Args:
        recipe: the run's.
        say: called with each line that is printed.
        world_size: number of ranks.
    """

    def __init__(self, recipe: TrainRecipe, say: Callable[[str], None], world_size: int) -> None:
        self.recipe, self.say, self.world_size = recipe, say, world_size
        self.step = self.tokens = 0
        self.loss = math.nan
        self.validation: dict[str, float] = {}
        self.changes: list[dict[str, Any]] = []  # every change of the recipe so far, and from which step on
        self.alarms = Alarms(recipe.alarms)
        self.reports: Reports | None = None  # once the run's folder is its own

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON."""
        return {
            "tokens": self.tokens,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "validation": self.validation,
            "alarms": self.alarms.state(),
            "changes": self.changes,
        }

    def restore(self, saved: SavedRun) -> None:
        """Continue from :meth:`state` of a checkpoint."""
        self.step, self.tokens = saved.step, int(saved.state["tokens"])
        self.loss = saved.state["loss"] if saved.state["loss"] is not None else math.nan
        self.validation = saved.state["validation"]
        self.changes = saved.state.get("changes", [])
        self.alarms.load_state(saved.state["alarms"])

    def describe(self, stage: Stage, done: int) -> None:
        """Print what a stage is about to do, and its warnings; ``done`` is how many of its steps are behind it."""
        trained = sum(math.prod(stage.tensors.shape(each)) for each in stage.tensors.stock_tensors if each.trained)
        more = f", from step {done + 1}" if done else ""
        for warning in stage.warnings:
            self.say(f"warning: {warning}")
        self.say(
            f"stage {stage.stage_recipe.name}: {stage.steps} steps of {self.recipe.tokens_per_step:,} tokens, "
            f"{trained:,} weights train ({', '.join(stage.stage_recipe.train)}), {self.world_size} "
            f"rank{'s' * (self.world_size > 1)} x {stage.passes} pass{'es' * (stage.passes > 1)}{more}"
        )
        if stage.spared:
            self.say(stage.spared)

    def count_step(self, result: StepResult) -> None:
        """Count a step, applied or not."""
        self.step, self.tokens, self.loss = self.step + 1, self.tokens + self.recipe.tokens_per_step, result.loss

    def report_step(
        self, stage: Stage, result: StepResult, rate: float, seconds: float, peak: float, device: torch.device
    ) -> None:
        """Report a step that was counted, and raise the alarms that it gives reason for.

        Args:
            stage: the one that it is of.
            result: what it gave.
            rate: the largest learning rate of its parameter groups.
            seconds: how long it took.
            peak: operations per second that one device can do.
            device: this rank's, whose memory is reported.
        """
        if self.reports is None:
            return
        speed = self.recipe.tokens_per_step / seconds
        dropped = stage.stepper.control.dropped({layer: len(count) for layer, count in result.counts.items()})
        report = StepReport(
            step=self.step,
            steps=sum(map(self.recipe.steps_of, self.recipe.stages)),
            stage=stage.stage_recipe.name,
            loss=result.loss,
            parts=result.parts,
            learning_rate=rate,
            gradient_norm=result.gradient_norm,
            applied=result.applied,
            tokens=self.tokens,
            tokens_per_second=speed,
            utilisation=stage.flops.total * speed / (peak * self.world_size),
            memory=memory_in_use(device),
            loads=loads(result.counts, dropped),
            dropped=result.dropped,
            experts=result.experts,
        )
        self.reports.step(report, self.step % self.recipe.log.every == 0)
        # A loss that is not finite is handled by the policy on bad steps; among the others it would be no spike.
        found = self.alarms.loss(self.step, result.loss) if math.isfinite(result.loss) else []
        self.raise_alarms(found + self.alarms.loads(self.step, result.counts, stage.top_k, dropped))

    def raise_alarms(self, alarms: Sequence[Alarm]) -> None:
        """Print alarms as warnings and record them."""
        for alarm in alarms:
            self.say(f"warning: {alarm.kind}: {alarm.message}")
            self._record({"kind": "alarm", "step": alarm.step, "alarm": alarm.kind, "message": alarm.message})

    def report_reference(self, losses: Mapping[str, float]) -> None:
        """Report the dense parent's losses, in nats per token by domain."""
        self.say("reference, of the parent  " + _listed(losses))
        self._record_losses("reference", losses)

    def report_validation(self, losses: Mapping[str, float]) -> None:
        """Report the losses on held-out text, in nats per token by domain; the last ones are the run's."""
        self.validation = dict(losses)
        self.say(f"validation at step {self.step}  {_listed(losses)}")
        self._record_losses("validation", losses)

    def report_passes(self, passes: Mapping[str, tuple[int, bool]]) -> None:
        """Report how often each domain's text was read to its end, and whether a further pass was begun."""
        self.say("data read  " + ", ".join(f"{name} {_times(*read)}" for name, read in passes.items()))
        counted = {f"passes/{name}": whole for name, (whole, _) in passes.items()}
        self._record({"kind": "passes", "step": self.step, "tokens": self.tokens, **counted})

    def warn(self, texts: Sequence[str]) -> None:
        """Print warnings and record them."""
        for text in texts:
            self.say(f"warning: {text}")
            self._record({"kind": "warning", "step": self.step, "message": text})

    def record_changes(self, changes: Sequence[Change]) -> None:
        """Print what the recipe changes from here on, and put it into the log and into every checkpoint to come."""
        for change in changes:
            self.say(f"changed: {change}")
            made = {"step": self.step, "key": change.key, "was": change.was, "now": change.now}
            self.changes = [*self.changes, made]
            self._record({"kind": "change", **made})

    def _record_losses(self, kind: str, losses: Mapping[str, float]) -> None:
        content = {f"{kind}/{name}": nats for name, nats in losses.items()}
        self._record({"kind": kind, "step": self.step, "tokens": self.tokens, **content})

    def _record(self, content: Mapping[str, Any]) -> None:
        if self.reports:
            self.reports.record(content)


def _listed(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {nats:.4f}" for name, nats in losses.items())


def _times(whole: int, begun: bool) -> str:
    """``in part``, ``once``, ``12 times and in part``, ``not at all``."""
    often = ["once" if whole == 1 else f"{whole} times"] * (whole > 0)
    return " and ".join([*often, *["in part"] * begun]) or "not at all"
