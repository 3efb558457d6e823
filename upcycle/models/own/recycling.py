"""Checkpoint recycling: SpheroMoE blocks whose experts are drawn from the FFNs of dense encoders (MoE Jetpack, arXiv 2406.04801)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from upcycle.architectures.described.find_ffns import FoundFfn, find_ffns
from upcycle.architectures.stock_auto import is_encoder
from upcycle.errors import RefusalError, UsageError
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.modeling import wrapped_model_class
from upcycle.models.own.slot_ffn import SlotFfn
from upcycle.models.own.slots import SlotBlock
from upcycle.recipe.conversion_recipe import layer_selection
from upcycle.registry import find

_UNIVERSAL = 4  # core experts are so many times as wide as universal ones


def recycle(
    sources: Sequence[Any],
    inputs: Iterable[Mapping[str, torch.Tensor]] = (),
    *,
    core: int,
    universal: int,
    width: int | None = None,
    layers: str | list[int] = "last-half",
    slots: int = 1,
    expert_dropout: float = 0.0,
    seed: int = 0,
) -> Any:
    """Return a model of the first source's class, with SpheroMoE blocks in some layers; everything else is the first source's.

    An expert's neurons are drawn without replacement, each in proportion to its importance, and for every expert anew, so that
    experts overlap. The importance of a neuron is the L2 norm of its activation over all tokens of ``inputs`` (the authors' release);
    without inputs, the product of the norms of what it reads and of what it adds. Experts take turns among the sources.
    The function of the dense model is lost: the result is to be trained.

    Deviations from the paper: the result is as wide as its sources, so that no channels are chosen, and core experts have ``width``
    neurons, by default half of the FFN's; universal experts have a quarter of that.

    Args:
        sources: stock encoders whose FFNs are described and of one size, as ``from_pretrained`` gives them.
        inputs: what the models read, batch by batch, as arguments of a call.
        core: wide experts; the paper has about as many as half of an image's tokens.
        universal: narrow experts; the paper has about as many as an image's tokens.
        width: neurons of a core expert.
        layers: as the recipe's key ``layers``.
        slots: that each expert reads.
        expert_dropout: see :class:`~upcycle.models.own.slot_ffn.SlotFfn`.
        seed: of the draws.

    Raises:
        RefusalError: a source's FFNs are not described, or it is no encoder.
        UsageError: the sources differ in their FFNs, or a number is not possible.
    """
    dense, places = sources[0], [_ffns_of(source) for source in sources]
    chosen = layer_selection(layers, len(places[0]))
    kind = {(ffn.hidden, ffn.width, ffn.activation, ffn.biases) for own in places for ffn in (own[i] for i in chosen)}
    if len(kind) > 1 or len({len(own) for own in places}) > 1:
        raise UsageError(
            "experts can be recycled from FFNs of one size and form only, and those of the sources, or of the chosen layers, differ",
            hint="choose layers of one size, or sources of one architecture and size",
        )
    (hidden, full, activation, biases) = kind.pop()
    width = full // 2 if width is None else width
    if not 1 <= width <= full or width % _UNIVERSAL or core < 0 or universal < 0 or core + universal < 1:
        raise UsageError(
            f"{core} core experts of {width} neurons and {universal} universal ones cannot be drawn from FFNs of {full} neurons",
            hint=f"width is a multiple of {_UNIVERSAL} up to {full}, and there is at least one expert",
        )
    widths = (width,) * core + (width // _UNIVERSAL,) * universal
    ffns = [places[0][i] for i in chosen]
    paths = tuple(ffn.replaced for ffn in ffns)
    own = SlotFfn(
        *(paths, hidden, activation, ffns[0].place.gated, bool(biases), widths),
        slots=slots,
        expert_dropout=expert_dropout,
        dropout=ffns[0].dropout,
    )
    weights = [
        [_weights(source.base_model, own[i]) for i in chosen] for source, own in zip(sources, places, strict=True)
    ]
    importance = [
        _importance(source, [own[i] for i in chosen], found, inputs)
        for source, own, found in zip(sources, places, weights, strict=True)
    ]
    config = wrapped_config(dense.config, [], [own])
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stock, own_config = cast("Any", type(dense)), cast("Any", type(config))
        model = wrapped_model_class(stock, own_config)(config).to(dense.dtype)
    model.load_state_dict(dense.state_dict(), strict=False)
    model.tie_weights()
    for place, ffn in enumerate(ffns):
        block = model.base_model.get_submodule(ffn.replaced[0])
        _fill(block, [found[place] for found in weights], [found[place] for found in importance], rng)
    return model.eval()


def _ffns_of(source: Any) -> list[FoundFfn]:
    described = find("described", source.config.model_type)
    if described is None or not is_encoder(source.config):
        raise RefusalError(
            f"{type(source).__name__}: SpheroMoE mixes all tokens, and its experts are recycled from described encoders",
            hint="a ViT, DeiT, DINOv2, or BERT: upcycle list families",
        )
    return find_ffns(source, described)


def _weights(base: nn.Module, ffn: FoundFfn) -> dict[str, torch.Tensor]:
    """Return gate and up ``[F, d]``, the rows of down ``[F, d]``, and biases, zeros where there are none."""
    found: dict[str, torch.Tensor] = {}
    for part in ("gate", "up", "down") if ffn.place.gated else ("up", "down"):
        module: Any = base.get_submodule(ffn.path(part))
        weight = module.weight.detach().T if ffn.place.columns else module.weight.detach()
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
        if ffn.place.fused and part != "down":
            half = ffn.place.fused.split().index(part)
            weight, bias = weight.chunk(2)[half], bias.chunk(2)[half]
        found[part], found[f"{part}_bias"] = (weight.T if part == "down" else weight), bias
    return found


@torch.no_grad()
def _importance(
    source: Any,
    ffns: Sequence[FoundFfn],
    weights: list[dict[str, torch.Tensor]],
    inputs: Iterable[Mapping[str, torch.Tensor]],
) -> list[torch.Tensor]:
    """Return every FFN's importance of neurons ``[F]``, in fp64; see :func:`recycle`."""
    from transformers.activations import ACT2FN

    squares = [torch.zeros(len(found["up"]), dtype=torch.float64) for found in weights]

    def reader(place: int) -> Any:
        found, act = weights[place], ACT2FN[ffns[place].activation]

        def read(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            hidden = functional.linear(x, found["up"], found["up_bias"])
            hidden = (
                act(functional.linear(x, found["gate"], found["gate_bias"])) * hidden
                if "gate" in found
                else act(hidden)
            )
            squares[place] += hidden.double().square().sum(0)

        return read

    base, was = source.base_model, source.training
    hooks = [base.get_submodule(ffn.path("up")).register_forward_pre_hook(reader(i)) for i, ffn in enumerate(ffns)]
    ran = False
    try:
        source.eval()
        for batch in inputs:
            source(**batch)
            ran = True
    finally:
        source.train(was)
        for hook in hooks:
            hook.remove()
    if ran:
        return [found.sqrt() for found in squares]
    chances = []
    for found in weights:
        read = torch.cat([found[part] for part in ("gate", "up") if part in found], 1)
        chances.append(read.double().norm(dim=1) * found["down"].double().norm(dim=1))
    return chances


@torch.no_grad()
def _fill(
    block: SlotBlock, weights: list[dict[str, torch.Tensor]], importance: list[torch.Tensor], rng: torch.Generator
) -> None:
    """Draw every expert's neurons, and copy them into a block."""
    experts: Any = block.experts
    first = 0
    for expert, width in enumerate(experts.widths):
        found, chances = weights[expert % len(weights)], importance[expert % len(weights)]
        # Silent neurons are drawn last, when there are no others left.
        chances = chances.clamp(min=1e-12 * float(chances.max().clamp(min=1e-300)))
        taken = torch.multinomial(chances, width, generator=rng)
        rows = slice(first * (2 if experts.gated else 1), (first + width) * (2 if experts.gated else 1))
        parts = ("gate", "up") if experts.gated else ("up",)
        into = experts.gate_up if experts.gated else experts.up
        into[rows] = torch.stack([found[part][taken] for part in parts], 1).flatten(0, 1)
        experts.down[first : first + width] = found["down"][taken]
        if experts.up_bias is not None:
            experts.up_bias[rows] = torch.stack([found[f"{part}_bias"][taken] for part in parts], 1).flatten()
        if experts.down_bias is not None:
            experts.down_bias[expert] = found["down_bias"]
        first += width
