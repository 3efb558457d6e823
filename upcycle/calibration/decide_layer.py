"""Decides one layer: its activations, its blueprint, its router and its refit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn.functional import linear

from upcycle.errors import CheckpointError
from upcycle.ffn.activations import HELD_OUT_EVERY, Activations, ExpertActivations, Inputs
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.reconstruction import BlockFit, BlockSchedule, LayerFunction, reconstruct
from upcycle.ffn.refit import Applied, Routing, fit_down, fit_scale
from upcycle.ffn.router_capture import captured
from upcycle.files.formats.token_files import TokenFile
from upcycle.planning.expert_job import ExpertJob

if TYPE_CHECKING:
    from upcycle.ffn.source_samples import Samples


def decide(job: ExpertJob, ffn: FeedForward, activations: Activations | None = None) -> LayerBlueprint:
    """Return the blueprint of one layer, with its router where there are experts to choose from.

    It depends on the recipe, the seed, this layer and its calibration tokens alone, so that a resumed run decides the same.
    """
    seed, shape = job.recipe.seed, job.shape.at(ffn.layer)
    blueprint = job.method.blueprint(ffn, shape, job.scale, generator(seed, ffn.layer, "method"), activations)
    draws = blueprint.draws
    if draws is not None and draws.rule == "initializer" and draws.std is None:
        blueprint = replace(blueprint, draws=replace(draws, std=job.dense.initializer_range))
    if not blueprint.routed:
        return blueprint
    blueprint = replace(blueprint, rule=shape.rule)
    made = job.router.network(blueprint, ffn, generator(seed, ffn.layer, "router"), activations)
    return replace(blueprint, router=job.method.tie(made.rows), router_hidden=made.hidden, router_form=shape.router)


def generator(seed: int, layer: int, purpose: str) -> torch.Generator:
    """Return a stream of random numbers that is independent for every layer and purpose."""
    from upcycle.ffn.random_weights import stream

    return stream(seed, layer, purpose)


def activations_of(
    ffn: FeedForward,
    inputs: TokenFile,
    batch: int,
    importance: torch.Tensor | None = None,
    cache_bytes: int = 0,
    samples: Samples | None = None,
    sources: Callable[[int], Activations] | None = None,
    weights: torch.Tensor | None = None,
) -> Activations:
    """Return the activations of a layer whose FFN inputs are in a file: ``batch`` tokens at a time, every eighth batch held out.

    ``weights`` ``[T]`` says how much each token's error counts; without it, all count the same.
    """

    def batches() -> Iterator[Inputs]:
        for number, x in enumerate(inputs.blocks(batch)):
            first = number * batch
            weight = torch.ones(len(x)) if weights is None else weights[first : first + len(x)]
            yield Inputs(x, weight, number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)

    return Activations(ffn, batches, inputs.tokens, importance, cache_bytes, samples, sources)


def targets_of(dense: TokenFile, residual: TokenFile, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Return a function that yields the outputs to fit a layer's experts to, fp32 ``[t, d]`` per batch.

    They are the dense model's stream after the layer (``dense``; before the norm at its end, if it has one), less the converted
    model's stream before its FFN.
    """

    def targets() -> Iterator[torch.Tensor]:
        pairs = zip(dense.blocks(batch), residual.blocks(batch), strict=True)
        return (whole - before for whole, before in pairs)

    return targets


def outputs_of(made: TokenFile, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Return such a function for a layer that norms the FFN's output: the targets are what the dense model's FFN made.

    What such a layer adds has a length that its norm decides, so no output of the experts can make up for what the stream lacks.
    """
    return lambda: made.blocks(batch)


def weights_behind_norm(made: TokenFile, batch: int, eps: float) -> torch.Tensor:
    """Return fp32 ``[T]``, mean one: how much each token's squared error counts where a norm follows.

    An RMSNorm divides ``y`` ``[d]`` by ``sqrt(mean(y^2) + eps)``, and so errors of it, to first order.
    """
    weights = torch.cat([1 / (block.square().mean(1) + eps) for block in made.blocks(batch)])
    return weights / weights.mean()


class Outputs(Protocol):
    """A decided layer as the converted model will compute it, with its weights in the dtype that is stored."""

    def on_calibration(self) -> Iterator[torch.Tensor]:
        """Yield the layer's outputs for the calibration tokens, fp32 ``[t, d]`` per batch."""

    def of(self, activations: Activations) -> Iterator[torch.Tensor]:
        """Yield the layer's outputs for other tokens, fp32 ``[t, d]`` per batch."""


@dataclass(frozen=True)
class ActiveNeurons:
    """Implements :class:`Outputs` for a layer whose gate and up are the dense ones.

    Attributes:
        applied: which neurons are active.
        active: their activations on the calibration tokens.
        down: fp32 ``[d, N]``, with all factors.
    """

    applied: Applied
    active: ExpertActivations
    down: torch.Tensor

    def on_calibration(self) -> Iterator[torch.Tensor]:
        """Yield the outputs for the calibration tokens."""
        return (linear(batch.hidden, self.down, self.applied.bias) for batch in self.active.batches())

    def of(self, activations: Activations) -> Iterator[torch.Tensor]:
        """Yield the outputs for other tokens."""
        active = ExpertActivations(activations, self.applied.active)
        return (linear(batch.hidden, self.down, self.applied.bias) for batch in active.batches())


@dataclass(frozen=True)
class OwnTensors:
    """Implements :class:`Outputs` for a layer whose gate, up and down were all fitted."""

    layer: LayerFunction
    activations: Activations

    def on_calibration(self) -> Iterator[torch.Tensor]:
        """Yield the outputs for the calibration tokens."""
        return self.of(self.activations)

    def of(self, activations: Activations) -> Iterator[torch.Tensor]:
        """Yield the outputs for other tokens."""
        return (self.layer.output(given.x) for given in activations.inputs())


class Decision(NamedTuple):
    """Holds the decision on a layer: its blueprint, what was measured on the way, and what it computes."""

    blueprint: LayerBlueprint
    report: dict[str, Any]
    outputs: Outputs


def decide_layer(
    job: ExpertJob, ffn: FeedForward, activations: Activations, targets: Callable[[], Iterator[torch.Tensor]]
) -> Decision:
    """Decide a layer's blueprint with its router, and refit its down projections, its scale or all its projections.

    Args:
        job: the conversion, which names method, router and refit.
        ffn: the dense layer's FFN.
        activations: its activations on the calibration tokens.
        targets: starts a pass over the outputs that the layer is fitted to, fp32 ``[t, d]`` per batch.

    Raises:
        CheckpointError: the fit is not finite in the stored dtype.
    """
    blueprint = decide(job, ffn, activations)  # the same decision as without calibration
    report: dict[str, Any] = {}
    if not job.shape.runs_all and blueprint.router is not None:
        report |= asdict(captured(activations, blueprint, blueprint.network.stored_as(ffn.dtype)))
    routing = Routing(blueprint, ffn)
    active = ExpertActivations(activations, routing.active)
    if job.refit == "none":
        return Decision(blueprint, report, ActiveNeurons(routing, active, routing.stored(blueprint)))
    if job.refit == "scale":
        factor, fit = fit_scale(routing, active, targets())
        blueprint = replace(blueprint, scale=blueprint.plain_scale * factor)
        return Decision(blueprint, report | fit.as_dict(), ActiveNeurons(routing, active, routing.stored(blueprint)))
    down, fit = fit_down(routing, active, targets(), everything=job.refit == "down")
    blueprint = replace(blueprint, down=down.to(ffn.down.dtype))
    _check_finite(blueprint, ffn)
    report |= fit.as_dict()
    if job.refit == "blocks":
        del active  # the activations of the closed form: training makes its own
        blueprint, trained = reconstruct_layer(job, blueprint, ffn, activations, targets)
        _check_finite(blueprint, ffn)
        return Decision(blueprint, report | trained.as_dict(), OwnTensors(LayerFunction(ffn, blueprint), activations))
    return Decision(blueprint, report, ActiveNeurons(routing, active, routing.stored(blueprint)))


def computed(job: ExpertJob, ffn: FeedForward, blueprint: LayerBlueprint, activations: Activations) -> Outputs:
    """Return what a layer that was decided before computes: to the bit what :func:`decide_layer` returned beside its blueprint."""
    if job.refit == "blocks":
        return OwnTensors(LayerFunction(ffn, blueprint), activations)
    routing = Routing(blueprint, ffn)
    return ActiveNeurons(routing, ExpertActivations(activations, routing.active), routing.stored(blueprint))


def reconstruct_layer(
    job: ExpertJob,
    blueprint: LayerBlueprint,
    ffn: FeedForward,
    activations: Activations,
    targets: Callable[[], Iterator[torch.Tensor]],
) -> tuple[LayerBlueprint, BlockFit]:
    """Train all projections of a refitted layer as the recipe's ``reconstruction`` says; see :func:`reconstruct`."""
    asked = job.recipe.reconstruction
    schedule = BlockSchedule(asked.passes, asked.batch, asked.rate)

    def batches() -> Iterator[tuple[Inputs, torch.Tensor]]:
        return zip(activations.inputs(), targets(), strict=True)

    return reconstruct(blueprint, ffn, batches, schedule, generator(job.recipe.seed, ffn.layer, "reconstruction"))


def _check_finite(blueprint: LayerBlueprint, ffn: FeedForward) -> None:
    """Refuse fitted projections that their dtype cannot hold."""
    assert blueprint.down is not None
    if not bool((blueprint.down * blueprint.scale).isfinite().all()):
        raise CheckpointError(f"layer {ffn.layer}: the refit overflows {ffn.down.dtype}", hint="--dtype bfloat16")
