"""Decides one layer: its activations, its blueprint, its router and its refit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from upcycle.errors import CheckpointError
from upcycle.ffn.activations import HELD_OUT_EVERY, Activations, ExpertActivations, Inputs
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.refit import Routing, fit_down, fit_scale
from upcycle.ffn.router_capture import captured
from upcycle.files.formats.token_files import TokenFile
from upcycle.planning.expert_job import ExpertJob

if TYPE_CHECKING:
    from upcycle.ffn.source_samples import Samples


def decide(job: ExpertJob, ffn: FeedForward, activations: Activations | None = None) -> LayerBlueprint:
    """Return the blueprint of one layer, with its router.

    It depends on the recipe, the seed, this layer and its calibration tokens alone, so that a resumed run decides the same.
    """
    seed, shape = job.recipe.seed, job.shape
    blueprint = job.method.blueprint(ffn, shape, job.scale, generator(seed, ffn.layer, "method"), activations)
    draws = blueprint.draws
    if draws is not None and draws.rule == "initializer" and draws.std is None:
        blueprint = replace(blueprint, draws=replace(draws, std=job.dense.initializer_range))
    rows = job.router.rows(blueprint, ffn, generator(seed, ffn.layer, "router"), activations)
    return replace(blueprint, router=job.method.tie(rows))


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
) -> Activations:
    """Return the activations of a layer whose FFN inputs are in a file: ``batch`` tokens at a time, every eighth batch held out."""

    def batches() -> Iterator[Inputs]:
        for number, x in enumerate(inputs.blocks(batch)):
            yield Inputs(x, torch.ones(len(x)), number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)

    return Activations(ffn, batches, inputs.tokens, importance, cache_bytes, samples, sources)


def targets_of(dense: TokenFile, residual: TokenFile, batch: int) -> Callable[[], Iterator[torch.Tensor]]:
    """Return a function that yields the outputs to fit a layer's experts to, fp32 ``[t, d]`` per batch.

    They are the dense model's stream after the layer, less the converted model's stream before its FFN.
    """

    def targets() -> Iterator[torch.Tensor]:
        pairs = zip(dense.blocks(batch), residual.blocks(batch), strict=True)
        return (whole - before for whole, before in pairs)

    return targets


class Decision(NamedTuple):
    """Holds the decision on a layer: its blueprint, what was measured on the way, and the activations of its neurons."""

    blueprint: LayerBlueprint
    report: dict[str, Any]
    routing: Routing
    active: ExpertActivations


def decide_layer(
    job: ExpertJob, ffn: FeedForward, activations: Activations, targets: Callable[[], Iterator[torch.Tensor]]
) -> Decision:
    """Decide a layer's blueprint with its router, and refit its down projections or its scale.

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
    if job.shape.top_k < job.shape.experts and blueprint.router is not None:
        rows = blueprint.router.to(ffn.dtype).float()
        report |= asdict(captured(activations, blueprint, rows))
    routing = Routing(blueprint, ffn)
    active = ExpertActivations(activations, routing.active)
    if job.refit == "none":
        return Decision(blueprint, report, routing, active)
    if job.refit == "scale":
        factor, fit = fit_scale(routing, active, targets())
        blueprint = replace(blueprint, scale=job.shape.top_k * factor)
        return Decision(blueprint, report | fit.as_dict(), routing, active)
    down, fit = fit_down(routing, active, targets())
    stored = down.to(ffn.down.dtype)
    if not bool((stored * blueprint.scale).isfinite().all()):
        raise CheckpointError(f"layer {ffn.layer}: the refit overflows {ffn.down.dtype}", hint="--dtype bfloat16")
    return Decision(replace(blueprint, down=stored), report | fit.as_dict(), routing, active)
