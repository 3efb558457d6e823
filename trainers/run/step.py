"""One optimizer step: the passes of a stage's global batch, everything that is added to the loss, and what was seen.

Whatever is added is of the global batch: the same tokens have the same loss and gradient in however many passes, on
however many ranks (:mod:`upcycle.trainers.losses.survey` says how).

B rows, L positions, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from upcycle.errors import UsageError
from upcycle.trainers.data.batches import PackedBatch
from upcycle.trainers.distillation.expert_targets import FfnRecord, capture_ffns, expert_target_losses
from upcycle.trainers.distillation.logit_cache import LogitCache
from upcycle.trainers.distillation.losses import (
    OutputRecord,
    capture_outputs,
    layer_outputs,
    logits_kl,
    matching,
    parent_sizes,
)
from upcycle.trainers.distillation.truncated_logits import TopLogits
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.distributed.reduction import Reduction, counted
from upcycle.trainers.losses.base import Loss, Means, WholeBatch, auxiliary_losses, loss_terms, make_losses
from upcycle.trainers.losses.survey import Survey, needed
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.recipe.training_recipe import DistillationRecipe, StageRecipe
from upcycle.trainers.routing.bias_balance import BiasBalance
from upcycle.trainers.routing.neuron_records import ActivationRecord, capture_activations
from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import RouterRecord, capture
from upcycle.trainers.routing.stock_routers import moe_layers, unread_warning, widened

_NO_TARGET = -100
_BLOCK = 1 << 20  # elements that are widened at once


@dataclass
class StepResult:
    """What one step gave, over all ranks.

    ``loss`` is the mean next-token loss in nats over the targets, ``parts`` every other loss with its coefficient,
    ``counts`` how many tokens chose each expert ``[E]`` by layer, ``applied`` whether weights were changed.
    """

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    applied: bool
    targets: int
    counts: dict[int, torch.Tensor] = field(default_factory=dict)
    dropped: float = 0.0  # fraction of choices that found no room
    by_domain: dict[str, tuple[float, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Totals:
    """How a pass's sums become those of all tokens that losses are of.

    ``parts`` is how many passes and ranks those tokens are divided among, ``sizes`` the parent's outputs' (known beforehand).
    """

    reduction: Reduction
    parts: int
    sizes: torch.Tensor | None = None


class Parent:
    """The dense model that is distilled from, run beside the student on the same tokens.

    Args:
        load: gives the model; called at once, or with a cache when a row is not in it.
        recipe: what the student is told of it.
        cache: its distributions on disk.
    """

    def __init__(self, load: Callable[[], Any], recipe: DistillationRecipe, cache: LogitCache | None = None) -> None:
        self._load, self.recipe, self.cache = load, recipe, cache
        self._model: Any = None
        matched = recipe.hidden > 0 or recipe.ffn > 0
        self.outputs: Recorder[OutputRecord] | None = capture_outputs(self.model) if matched else None
        self.ffns: Recorder[FfnRecord] | None = capture_ffns(self.model) if recipe.taught else None
        if cache is None:
            _ = self.model  # what is needed anyway is missed before the first step

    @property
    def model(self) -> Any:
        """The model, without gradients."""
        if self._model is None:
            self._model = self._load().eval().requires_grad_(False)
        return self._model

    @torch.no_grad()
    def logits(self, batch: PackedBatch, last: int = 0) -> torch.Tensor:
        """``[B, L, V]`` of a batch on the model's device, or of its ``last`` positions alone."""
        found: torch.Tensor = _run(self.model, batch, last).logits
        return found

    def sizes(self, batch: PackedBatch) -> torch.Tensor:
        """What the outputs of a batch that has just run are compared in proportion to; see :func:`parent_sizes`."""
        assert self.outputs is not None
        return parent_sizes(self.recipe, layer_outputs(self.outputs.take()), batch.mask)

    def targets(self, batch: PackedBatch) -> torch.Tensor | TopLogits:
        """What the student's logits at all positions but the last are compared with: ``[B, L - 1, V]``, or cached ones."""
        if self.cache is not None:
            return self.cache.targets(batch, self.logits)
        return self.logits(batch)[:, :-1]


class Stepper:
    """Runs the steps of one stage.

    Make it before the engine, as noise of routers adds parameters, but :meth:`attach` what reads routers after it where
    experts are divided: DeepSpeed replaces the blocks.
    """

    def __init__(self, model: Any, stage: StageRecipe, ranks: Ranks, parent: Parent | None, clip: float) -> None:
        self.model, self.stage, self.ranks, self.parent, self.clip = model, stage, ranks, parent, clip
        self.losses: list[Loss] = make_losses(stage.losses)
        self.control = RouterControl(stage.control)
        self.balance: BiasBalance | None = None
        self.routers: Recorder[RouterRecord] | None = None
        self.activations: Recorder[ActivationRecord] | None = None
        self.outputs: Recorder[OutputRecord] | None = None
        self.seed = 0  # of the step that is being taken; the same on every rank
        self._known = _Totals(ranks.reduction, ranks.world_size)  # likewise

    def attach(self) -> None:
        """Record what the stage's losses read.

        Raises:
            UsageError: the model has no routers, or no activations, for a loss of the stage.
        """
        reads = {loss.reads for loss in self.losses}
        routed = bool(moe_layers(self.model))
        self._check_routed(routed)
        if routed and "activations" in reads:
            names = ", ".join(loss.name for loss in self.losses if loss.reads == "activations")
            raise UsageError(
                f"losses: {names} is a loss of dense FFNs, and this is a MoE",
                hint="use it before the model is converted",
            )
        if routed:
            self.routers = capture(self.model, self.control)
        if "activations" in reads:
            self.activations = capture_activations(self.model)
        if self.parent is not None and self.parent.outputs is not None:
            self.outputs = capture_outputs(self.model)
        if self.stage.balance is not None:
            self.balance = BiasBalance(self.model, self.stage.balance)

    def _check_routed(self, routed: bool) -> None:
        """Refuse what reads or changes routers where there is none that can be read."""
        asked = [f"losses.{loss.name}" for loss in self.losses if loss.reads == "router"]
        asked += ["balance"] if self.stage.balance is not None else []
        asked += ["control"] if self.stage.control != ControlParameters() else []
        if asked and not routed:
            reason = unread_warning(self.model) or f"{self.model.config.model_type} is a dense model, without routers"
            raise UsageError(f"{asked[0]}: {reason}", hint=f"leave out {', '.join(asked)}")

    def detach(self) -> None:
        """Take every hook off again."""
        of_parent = (self.parent.outputs, self.parent.ffns) if self.parent else ()
        for recorder in (self.routers, self.activations, self.outputs, *of_parent):
            if recorder is not None:
                recorder.close()
        self.control.detach()

    def step(self, engine: Any, batches: Sequence[PackedBatch], progress: float) -> StepResult:
        """Forward, backward and update.

        Args:
            engine: DeepSpeed's.
            batches: this rank's, one per pass, on its device.
            progress: the fraction of the stage that is done, for losses that ramp up.
        """
        mine = sum(int(batch.mask[:, 1:].sum()) for batch in batches)
        targets = max(1, int(self.ranks.sums(mine)[0]))
        # DeepSpeed averages gradients over ranks and passes: this makes it the mean over all targets of the global batch.
        weight = self.ranks.world_size * len(batches) / targets
        self._known = self._totals(engine, batches)
        seen = _Seen(len(batches))
        norm = math.nan
        for number, batch in enumerate(batches):
            self._announce(batch, number)
            loss, parts, nats = self._losses(engine, batch, weight, progress)
            seen.add(batch, nats, parts)
            engine.backward(loss)
            if number == len(batches) - 1:
                norm = self._clip_undivided(engine)
            engine.step()
        if not self._undivided(engine):
            norm = float(engine.get_global_grad_norm())
        applied = bool(engine.was_step_applied()) and math.isfinite(norm)
        if applied:
            for each in self.losses:
                each.after_step()
            if self.balance is not None:
                self.balance.after_step(self.ranks.reduction)
        return seen.result(self.ranks, targets, norm, applied)

    def _totals(self, engine: Any, batches: Sequence[PackedBatch]) -> _Totals:
        """What losses that are no sums over tokens need to know of all passes and ranks before the first backward pass."""
        world_size, passes, own = self.ranks.world_size, len(batches), self.parent.recipe if self.parent else None
        if passes == 1 or self.stage.losses_over == "pass":
            return _Totals(self.ranks.reduction, world_size)
        wanted = needed(self.losses, own, passes, self.stage.losses_over)
        sums, sizes = self._surveyed(engine, batches, wanted)
        parts = world_size * passes
        if sums is not None:
            return _Totals(WholeBatch(self.ranks.total(sums), parts), parts, sizes)
        counts: dict[str, torch.Tensor] = {}
        for loss in self.losses:
            found = [loss.mean_over(batch.real) for batch in batches]
            counts[loss.name] = self.ranks.total(
                torch.stack([each.double() for each in found if each is not None]).sum(0)
            )
        return _Totals(Means(counts, parts), parts, sizes)

    @torch.no_grad()
    def _surveyed(
        self, engine: Any, batches: Sequence[PackedBatch], wanted: Survey
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Sums of all losses and layers over this rank's passes, and the parent's sizes over all ranks'; in fp64."""
        sums: list[torch.Tensor] = []
        sizes: list[torch.Tensor] = []
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # what models draw themselves, they draw again
            for number, batch in enumerate(batches):
                if wanted.student:
                    self._announce(batch, number)
                    _run(engine, batch, last=1)
                    pieces = loss_terms(self.losses, self._read(self._routers()), batch.real)
                    sums.append(torch.cat([piece.sums.double() for piece in pieces]))
                if wanted.parent and self.parent is not None:
                    self.parent.logits(batch, last=1)
                    sizes.append(self.parent.sizes(batch).double())
        return (
            torch.stack(sums).sum(0) if sums else None,
            self.ranks.total(torch.stack(sizes).sum(0)) if sizes else None,
        )

    def _announce(self, batch: PackedBatch, number: int) -> None:
        """Tell routers what the rows of a pass are, and their places in the global batch, which noise is drawn by."""
        size = len(batch.ids)
        first = (number * self.ranks.world_size + self.ranks.rank) * size
        self.control.rows(batch.real, [(self.seed, first + row) for row in range(size)])

    def _routers(self) -> list[RouterRecord]:
        return self.routers.take() if self.routers else []

    def _read(self, records: list[RouterRecord]) -> dict[str, list[Any]]:
        return {"router": records, "activations": self.activations.take() if self.activations else []}

    def _losses(
        self, engine: Any, batch: PackedBatch, weight: float, progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
        logits = _run(engine, batch).logits
        mask = batch.mask[:, 1:]
        nats = next_token_losses(logits, batch.ids) * mask
        own = self.parent.recipe if self.parent else None
        loss = nats.sum() * weight * (own.next_token if own else 1.0)
        parts: dict[str, torch.Tensor] = {}
        records = self._routers()
        if self.losses:
            parts |= auxiliary_losses(self.losses, self._read(records), batch.real, self._known.reduction, progress)
        if self.parent is not None and own is not None:
            parts |= self._distilled(self.parent, logits, batch, weight)
        if self.balance is not None:
            self.balance.observe(records, batch.real)
        total = loss
        for part in parts.values():
            total = total + part
        return total, {name: part.detach() for name, part in parts.items()}, (nats.detach(), records)

    def _distilled(
        self, parent: Parent, logits: torch.Tensor, batch: PackedBatch, weight: float
    ) -> dict[str, torch.Tensor]:
        wanted, mask = parent.targets(batch), batch.mask[:, 1:]
        found: dict[str, torch.Tensor] = {}
        if parent.recipe.logits:
            mean = logits_kl(logits[:, :-1], wanted, mask, parent.recipe.temperature)
            found["kl"] = parent.recipe.logits * mean * mask.sum() * weight
        if self.outputs is not None and parent.outputs is not None:
            student, dense = layer_outputs(self.outputs.take()), layer_outputs(parent.outputs.take())
            sizes = self._known.sizes
            if sizes is None:
                sizes = self.ranks.total(parent_sizes(parent.recipe, dense, batch.mask))
            shares = matching(parent.recipe, student, dense, batch.mask, sizes)
            found |= {name: self._known.parts * share for name, share in shares.items()}
        if parent.ffns is not None:
            losses = expert_target_losses(parent.recipe, self.model, parent.ffns.take(), batch.mask)
            share = batch.mask.sum() * weight
            found |= {name: value * share for name, value in losses.items()}
        return found

    def _undivided(self, engine: Any) -> bool:
        return not engine.zero_optimization_stage()

    def _clip_undivided(self, engine: Any) -> float:
        """Without ZeRO nobody measures the gradient, nor looks whether it is finite. The update is left out if it is not."""
        if not self._undivided(engine):
            return math.nan
        held = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = gradient_norm([parameter.grad for parameter in held if parameter.grad is not None])
        if not torch.isfinite(norm):
            for parameter in held:
                parameter.grad = None
        elif self.clip:
            torch.nn.utils.clip_grads_with_norm_(held, self.clip, norm)
        return float(norm)


def _run(model: Any, batch: PackedBatch, last: int = 0) -> Any:
    """The model's output for a batch; its logits at the ``last`` positions alone, or at all."""
    some = {"logits_to_keep": last} if last else {}
    return model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **some)


def gradient_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together, fp32, summed in fp64 as ZeRO does.

    fp32 sums of a large tensor drift: 1.4% at 134 million elements. Blocks bound what is held in fp64 to 8 MB.
    """
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device if gradients else None)
    for gradient in gradients:
        for block in gradient.detach().reshape(-1).split(_BLOCK):
            total += block.double().square().sum().to(total.device)
    return total.sqrt().float()


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``-log p`` of every next token in nats, ``[B, L - 1]``, in at least fp32."""
    # The last position has no target. Leaving it out instead would copy all logits, and their gradient back.
    targets = pad(ids[:, 1:], (0, 1), value=_NO_TARGET)
    nats = cross_entropy(widened(logits).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=_NO_TARGET)
    return nats.view(ids.shape)[:, :-1]


class _Seen:
    """Sums over a step's passes on this rank."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._nats: Any = 0.0
        self._parts: dict[str, torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._dropped: list[torch.Tensor] = []
        self._domains: dict[str, list[Any]] = {}

    def add(self, batch: PackedBatch, seen: Any, parts: dict[str, torch.Tensor]) -> None:
        nats, records = seen
        self._nats = self._nats + nats.double().sum()
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part
        for record in records:
            counts = counted(record.chosen.detach(), batch.real)
            self._counts[record.layer] = self._counts.get(record.layer, torch.zeros_like(counts)) + counts
            if record.kept is not None:
                dropped = counted(record.dropped, batch.real).sum()
                self._dropped.append(torch.stack([dropped, batch.real.sum() * record.experts.shape[1]]))
        for row, domain in enumerate(batch.domains):
            own = self._domains.setdefault(domain, [0.0, 0])
            own[0] = own[0] + nats[row].double().sum()
            own[1] = own[1] + batch.mask[row, 1:].sum()

    def result(self, ranks: Ranks, targets: int, norm: float, applied: bool) -> StepResult:
        """One exchange for all numbers, one for all layers' counts."""
        names = list(self._parts)
        dropped = torch.stack(self._dropped).sum(0).tolist() if self._dropped else [0, 0]
        total, gone, choices, *parts = ranks.sums(
            float(self._nats), *map(float, dropped), *(float(self._parts[name]) for name in names)
        )
        # Auxiliary losses are the global ones on every rank already; what is distilled is each rank's share.
        shares = {name: value / self._passes / ranks.world_size for name, value in zip(names, parts, strict=True)}
        counts = self._counts
        if counts and ranks.world_size > 1:
            stacked = ranks.total(torch.stack(list(counts.values())))
            counts = dict(zip(counts, stacked, strict=True))
        by_domain = {name: (float(nats), int(count)) for name, (nats, count) in self._domains.items()}
        return StepResult(
            total / targets, shares, norm, applied, targets, counts, gone / choices if choices else 0.0, by_domain
        )
