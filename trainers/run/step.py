"""One optimizer step: the passes of a global batch, and every loss that is added to the next-token loss.

Every loss is that of the whole global batch: the same tokens have the same loss and gradient in however many passes and on
however many ranks they come (:mod:`upcycle.trainers.losses.survey` says how). B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from upcycle.errors import UsageError
from upcycle.trainers.data.packed_attention import packed_forward
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation.expert_targets import expert_target_losses
from upcycle.trainers.distillation.losses import (
    OutputRecord,
    capture_outputs,
    layer_outputs,
    logits_kl,
    matching,
    parent_sizes,
)
from upcycle.trainers.distillation.parent import Parent
from upcycle.trainers.distillation.preference import pairs_in, preference_losses
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.distributed.reduction import Reduction
from upcycle.trainers.losses.base import Loss, Means, WholeBatch, auxiliary_losses, loss_terms, make_losses
from upcycle.trainers.losses.next_token import token_losses
from upcycle.trainers.losses.survey import Survey, needed
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.recipe.training_recipe import StageRecipe
from upcycle.trainers.routing.all_parts import part_name, reads_images
from upcycle.trainers.routing.bias_balance import BiasBalance
from upcycle.trainers.routing.neuron_records import ActivationRecord, capture_activations
from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import RouterRecord, capture, with_absent
from upcycle.trainers.routing.stock_routers import MoeLayer, moe_layers, unread_warning
from upcycle.trainers.run.step_result import PassSums, StepResult

_BLOCK = 1024  # squares that are added up in fp32


@dataclass(frozen=True)
class _BatchTotals:
    """What turns one pass's sums into those of all the tokens that its losses are over.

    ``parts`` is the number of passes and ranks that these tokens are divided among. ``sizes`` are the denominators of
    :func:`matching` over all of them, where they are known before the pass runs.
    """

    reduction: Reduction
    parts: int
    sizes: torch.Tensor | None = None


class Stepper:
    """Runs the steps of one stage.

    Make it before the engine, because learned router noise adds parameters to the model. Where experts are divided among
    ranks, :meth:`attach` its hooks after the engine is made, because DeepSpeed replaces the MoE blocks.

    Args:
        model: the stock model that is trained.
        stage: its recipe.
        ranks: all of them.
        parent: the dense model to distil from, if any.
        clip: largest norm of the gradient; 0: not clipped.
    """

    def __init__(self, model: Any, stage: StageRecipe, ranks: Ranks, parent: Parent | None, clip: float) -> None:
        self.model, self.stage, self.ranks, self.parent, self.clip = model, stage, ranks, parent, clip
        self.losses: list[Loss] = make_losses(stage.losses)
        for part, named in stage.tower_losses.items():
            self.losses += make_losses(named, part)
        self._layers: list[MoeLayer] = []  # whose routers are read; towers' alone may not run in a pass
        self._towers: list[torch.nn.Parameter] = []  # weights that a pass without images does not reach
        self.control = RouterControl(stage.control)
        self.balance: BiasBalance | None = None
        self.routers: Recorder[RouterRecord] | None = None
        self.activations: Recorder[ActivationRecord] | None = None
        self.outputs: Recorder[OutputRecord] | None = None
        self.seed = 0  # of the step that is being taken; the same on every rank
        self._batch_totals = _BatchTotals(ranks.reduction, ranks.world_size)  # of the step that is being taken
        self._pair_weight = 1.0  # what makes sums over a pass's preferences the mean over all of the step

    def attach(self) -> None:
        """Record from now on what the stage's losses read.

        Raises:
            UsageError: a loss of the stage reads routers or activations that the model does not have.
        """
        reads = {loss.reads for loss in self.losses}
        self._layers = moe_layers(self.model)
        routed = bool(self._layers)
        self._check_routed()
        if reads_images(self.model):
            self._towers = [p for name, p in self.model.named_parameters() if part_name(self.model, name) != "language"]
        if routed and "activations" in reads:
            names = ", ".join(loss.name for loss in self.losses if loss.reads == "activations")
            raise UsageError(
                f"losses: {names} is a loss of dense FFNs, and this model is a MoE",
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

    def _check_routed(self) -> None:
        """Refuse keys of the stage that read or change routers, where the model has none that can be read."""
        routed = any(layer.part == "language" for layer in self._layers)
        self._check_towers()
        keys = [f"losses.{loss.name}" for loss in self.losses if loss.reads == "router" and loss.part == "language"]
        keys += ["balance"] if self.stage.balance is not None else []
        keys += ["control"] if self.stage.control != ControlParameters() else []
        if keys and not routed:
            reason = unread_warning(self.model) or f"{self.model.config.model_type} is a dense model, without routers"
            raise UsageError(f"{keys[0]}: {reason}", hint=f"leave out {', '.join(keys)}")

    def _check_towers(self) -> None:
        """Refuse losses of routers of a part that has none."""
        there = {layer.part for layer in self._layers}
        for loss in self.losses:
            if loss.part != "language" and (loss.part not in there or loss.reads != "router"):
                why = (
                    "the model has no routers there"
                    if reads_images(self.model)
                    else "the data have no images, so that this part does not run"
                )
                raise UsageError(
                    f"tower_losses.{loss.label}: {why if loss.reads == 'router' else 'it reads no routers'}",
                    hint=f"leave out tower_losses.{loss.part}, or convert that part: part: [{loss.part}, ...]",
                )

    def detach(self) -> None:
        """Remove every hook."""
        parents = (self.parent.outputs, self.parent.ffns) if self.parent else ()
        for recorder in (self.routers, self.activations, self.outputs, *parents):
            if recorder is not None:
                recorder.close()
        self.control.detach()

    def step(self, engine: Any, batches: Sequence[PackedBatch], progress: float) -> StepResult:
        """Run forward and backward through every pass, and update the weights.

        Args:
            engine: DeepSpeed's.
            batches: this rank's, one per pass, on its device.
            progress: the fraction of the stage that is done, for losses that ramp up.
        """
        on_this_rank = sum(int(batch.mask[:, 1:].sum()) for batch in batches)
        targets, pairs = map(int, self.ranks.sums(on_this_rank, sum(map(pairs_in, batches))))
        targets = max(1, targets)
        # DeepSpeed averages gradients over ranks and passes. This factor makes that the mean over all targets.
        weight = self.ranks.world_size * len(batches) / targets
        self._batch_totals = self._totals(engine, batches)
        self._pair_weight = self.ranks.world_size * len(batches) / max(1, pairs)
        sums = PassSums(len(batches))
        norm = math.nan
        for number, batch in enumerate(batches):
            self._announce(batch, number)
            loss, parts, nats, records = self._losses(engine, batch, weight, progress)
            sums.add(batch, nats, records, parts)
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
        return sums.result(self.ranks, targets, norm, applied)

    def _totals(self, engine: Any, batches: Sequence[PackedBatch]) -> _BatchTotals:
        """What losses need to know of all passes and ranks before the first backward pass."""
        world_size, passes = self.ranks.world_size, len(batches)
        distillation = self.parent.recipe if self.parent else None
        if passes == 1 or self.stage.losses_over == "pass":
            return _BatchTotals(self.ranks.reduction, world_size)
        survey = needed(self.losses, distillation, passes, self.stage.losses_over)
        if any(loss.part != "language" for loss in self.losses):  # whose means are over images, not over rows
            survey = replace(survey, student=True)
        sums, sizes = self._surveyed(engine, batches, survey)
        parts = world_size * passes
        if sums is not None:
            return _BatchTotals(WholeBatch(self.ranks.total(sums), parts), parts, sizes)
        counts: dict[str, torch.Tensor] = {}
        for loss in self.losses:
            found = [loss.mean_over(batch.real) for batch in batches]
            counts[loss.label] = self.ranks.total(
                torch.stack([each.double() for each in found if each is not None]).sum(0)
            )
        return _BatchTotals(Means(counts, parts), parts, sizes)

    @torch.no_grad()
    def _surveyed(
        self, engine: Any, batches: Sequence[PackedBatch], survey: Survey
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Sums of all losses and layers over this rank's passes, and the parent's sizes over all ranks; both fp64."""
        sums: list[torch.Tensor] = []
        sizes: list[torch.Tensor] = []
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # so that the pass itself draws the same numbers again
            for number, batch in enumerate(batches):
                if survey.student:
                    self._announce(batch, number)
                    packed_forward(engine, batch, last=1)
                    terms = loss_terms(self.losses, self._read(self._routers()), batch.real)
                    sums.append(torch.cat([term.sums.double() for term in terms]))
                if survey.parent and self.parent is not None:
                    self.parent.logits(batch, last=1)
                    sizes.append(self.parent.sizes(batch).double())
        return (
            torch.stack(sums).sum(0) if sums else None,
            self.ranks.total(torch.stack(sizes).sum(0)) if sizes else None,
        )

    def _announce(self, batch: PackedBatch, number: int) -> None:
        """Tell routers which tokens of a pass are real, and where its rows lie in the global batch.

        Their noise is a function of that place, so that it does not depend on how the batch is divided.
        """
        size = len(batch.ids)
        first = (number * self.ranks.world_size + self.ranks.rank) * size
        self.control.rows(batch.real, [(self.seed, first + row) for row in range(size)])

    def _routers(self) -> list[RouterRecord]:
        records = self.routers.take() if self.routers else []
        if self.routers is None or len(records) == len(self._layers):
            return records
        like = (
            records[0].logits if records else next(self.model.parameters())
        )  # only towers have routers, and no image came
        return with_absent(records, self._layers, like.dtype, like.device)

    def _reached(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, with gradients of at least 0 for all towers' weights: ranks add up gradients of the same weights.

        A pass without images does not reach them, nor does any pass an encoder's last layer where a model reads the one below.
        """
        for weight in self._towers:
            if weight.requires_grad:
                loss = loss + 0.0 * weight.sum()
        return loss

    def _read(self, records: list[RouterRecord]) -> dict[str, list[Any]]:
        return {"router": records, "activations": self.activations.take() if self.activations else []}

    def _losses(
        self, engine: Any, batch: PackedBatch, weight: float, progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, list[RouterRecord]]:
        """The loss to differentiate, its other parts by name, next-token losses ``[B, L - 1]``, and the routers' records."""
        logits = packed_forward(engine, batch).logits
        distillation = self.parent.recipe if self.parent else None
        share = distillation.next_token if distillation else 1.0
        nats = token_losses(logits if share else logits.detach(), batch)  # of weight 0, they are only told
        loss = self._reached(nats.sum() * weight * share)
        parts: dict[str, torch.Tensor] = {}
        records = self._routers()
        if self.losses:
            parts |= auxiliary_losses(
                self.losses, self._read(records), batch.real, self._batch_totals.reduction, progress
            )
        if self.parent is not None:
            parts |= self._distilled(self.parent, logits, batch, weight)
        if self.balance is not None:
            self.balance.observe(records, batch.real)
        total = loss
        for part in parts.values():
            total = total + part
        return total, {name: part.detach() for name, part in parts.items()}, nats.detach(), records

    def _distilled(
        self, parent: Parent, logits: torch.Tensor, batch: PackedBatch, weight: float
    ) -> dict[str, torch.Tensor]:
        """The stage's distillation losses by name, weighted; all read the same forward pass of the parent."""
        whole, mask = parent.targets(batch), batch.mask[:, 1:]
        found: dict[str, torch.Tensor] = {}
        if parent.recipe.logits:
            if isinstance(whole, torch.Tensor):  # masked and not cut: a slice would copy the gradient of all logits
                every = batch.at_predicting(mask)
                mean = logits_kl(logits, whole, every, parent.recipe.temperature)
            else:
                mean = logits_kl(batch.predicting(logits), whole, mask, parent.recipe.temperature)
            found["kl"] = parent.recipe.logits * mean * mask.sum() * weight
        if parent.recipe.preference and pairs_in(batch):
            assert isinstance(whole, torch.Tensor)
            losses_of_pairs = preference_losses(logits, whole, batch, parent.recipe.beta)
            found["preference"] = parent.recipe.preference * losses_of_pairs.sum() * self._pair_weight
        if self.outputs is not None and parent.outputs is not None:
            student, dense = layer_outputs(self.outputs.take()), layer_outputs(parent.outputs.take())
            sizes = self._batch_totals.sizes
            if sizes is None:
                sizes = self.ranks.total(parent_sizes(parent.recipe, dense, batch.mask))
            shares = matching(parent.recipe, student, dense, batch.mask, sizes)
            found |= {name: self._batch_totals.parts * share for name, share in shares.items()}
        if parent.ffns is not None:
            losses = expert_target_losses(parent.recipe, self.model, parent.ffns.take(), batch.mask)
            share = batch.mask.sum() * weight
            found |= {name: value * share for name, value in losses.items()}
        return found

    def _undivided(self, engine: Any) -> bool:
        return not engine.zero_optimization_stage()

    def _clip_undivided(self, engine: Any) -> float:
        """The gradient's norm where ZeRO is off, after clipping it; NaN where ZeRO is on and does this itself.

        Without ZeRO, DeepSpeed neither measures the gradient nor notices that it is not finite. Then it is dropped here, so
        that the optimizer's step changes nothing.
        """
        if not self._undivided(engine):
            return math.nan
        stepped = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
        held = [parameter for parameter in stepped if parameter.grad is not None]
        norm = gradient_norm([parameter.grad for parameter in held if parameter.grad is not None])
        if not torch.isfinite(norm):
            for parameter in held:
                parameter.grad = None
        elif self.clip:
            torch.nn.utils.clip_grads_with_norm_(held, self.clip, norm)
        return float(norm)


def gradient_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together, a fp32 scalar.

    Sums in fp32 drift: by 1.4% at 134 million elements. So only ``_BLOCK`` squares at a time are added up in fp32, which errs by
    a few of its roundings, and those sums in fp64. Where squares are too large for fp32, all is added up in fp64.
    """
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device if gradients else None)
    for gradient in gradients:
        flat = gradient.detach().reshape(-1)
        even = len(flat) // _BLOCK * _BLOCK
        for part in (flat[:even].view(-1, _BLOCK), flat[None, even:]):
            norms = torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)
            squares = norms.double().square().sum()
            if not torch.isfinite(squares):
                squares = part.double().square().sum()
            total += squares.to(total.device)
    return total.sqrt().float()
