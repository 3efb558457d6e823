"""What every router of a stock MoE model computed in one forward pass. T tokens, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from upcycle.models.own.moe_block import MoeBlock
from upcycle.trainers.distributed.expert_parallel import is_parallel, read_router
from upcycle.trainers.routing.all_parts import ModelPart
from upcycle.trainers.routing.recorder import Recorded, Recorder
from upcycle.trainers.routing.router_control import Noise, RouterControl
from upcycle.trainers.routing.routing_rule import RoutingRule, widened
from upcycle.trainers.routing.stock_routers import MoeLayer, require_moe_layers


@dataclass(frozen=True)
class RouterRecord:
    """One router in one forward pass; gradients flow through all but ``experts`` and ``kept``. The id E stands for no expert.

    ``logits`` ``[T, E]`` are what the router's rows gave (normalised, if they are, and before noise), ``weights`` and
    ``experts`` ``[T, K]`` what the block then used, in no particular order. ``noise`` is what was added to the logits for
    the choice, ``kept`` (bool ``[T, K]``) which choices were dispatched, where capacity or chance may hold some back, and
    ``skipped`` (likewise) those that chance held back. ``correction`` ``[T, E]`` is what
    its predictor of expert choice said, where experts choose. ``part`` is the part of the model that the router is in, and
    ``own_real`` which of its tokens count, bool ``[B', S']``, where they are not those of the rows: an encoder's are those of images.
    """

    layer: int
    logits: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    rule: RoutingRule
    noise: Noise | None = None
    kept: torch.Tensor | None = None
    skipped: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    part: ModelPart = "language"
    own_real: torch.Tensor | None = None

    def real(self, of_rows: torch.Tensor | None) -> torch.Tensor | None:
        """Which tokens count, given those of the rows ``[B, S]``."""
        return of_rows if self.own_real is None else self.own_real

    @cached_property
    def scores(self) -> torch.Tensor:
        """``[T, E]`` in at least fp32: the softmax or the sigmoids of the logits."""
        return self.rule.scores(self.logits)

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """``[T, E]`` in at least fp32, rows summing to 1."""
        return self.rule.probabilities(self.logits)

    @cached_property
    def chosen(self) -> torch.Tensor:
        """``[T, E]`` in the dtype of the scores, without gradient: 1 where an expert was chosen, dropped or not."""
        return self.spread(torch.ones_like(self.experts, dtype=self.scores.dtype))

    @cached_property
    def load(self) -> torch.Tensor:
        """``[T, E]``, likewise: the share of each expert in its token's choices. Rows sum to 1, or to 0 where there is none."""
        return self.chosen / self.chosen.sum(1, keepdim=True).clamp(min=1)

    @cached_property
    def gates(self) -> torch.Tensor:
        """``[T, E]`` in the dtype of the scores: every expert's weight before any choice was dropped; with gradient."""
        return self.spread(self.undropped.to(self.scores.dtype))

    def spread(self, values: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """``[T, E]``: ``values`` at the places of ``experts`` (both ``[T, K]``, by default the chosen ones), 0 elsewhere."""
        places = self.experts if experts is None else experts
        every = values.new_zeros(len(values), self.rule.experts + 1)  # the last is for what is no expert
        return every.scatter(1, places, values)[:, :-1]

    @cached_property
    def undropped(self) -> torch.Tensor:
        """``[T, K]``: the weights as the router gave them, before any choice was dropped; with gradient."""
        if self.kept is None:
            return self.weights
        noisy = self.logits if self.noise is None else widened(self.logits) + self.noise.added
        return self.rule.weigh(self.rule.scores(noisy), self.experts)

    @cached_property
    def first(self) -> torch.Tensor:
        """``[T, 1]``: every token's expert of largest weight, dropped or not."""
        return self.experts.gather(1, self.undropped.argmax(1, keepdim=True))

    @cached_property
    def dropped(self) -> torch.Tensor:
        """Bool ``[T, K]``: which choices found no room; those that chance held back asked for none."""
        if self.kept is None:
            return torch.zeros_like(self.experts, dtype=torch.bool)
        return ~self.kept if self.skipped is None else ~self.kept & ~self.skipped


def capture(
    model: nn.Module, control: RouterControl | None = None, layers: Container[int] | None = None
) -> Recorder[RouterRecord]:
    """Record every router of ``model`` from now on, and let ``control`` change what they decide.

    Args:
        model: a stock MoE causal language model, not wrapped; call it through any wrapper.
        control: noise, jitter, normalised logits or capacity; acts in recomputed layers, too.
        layers: the layers whose routers are recorded and controlled, by index; by default all.

    Raises:
        UsageError: ``model`` has no MoE layer, or its routers cannot be read.
    """
    found = require_moe_layers(model)
    recorder: Recorder[RouterRecord] = Recorder(model)
    for layer in found:
        if layers is not None and layer.index not in layers:
            continue
        if control is not None and layer.part == "language":
            control.attach(layer)
        watch_router(recorder, layer.block, layer.router, _reader(layer, control), layer.part != "language")
    return recorder


def _reader(layer: MoeLayer, control: RouterControl | None) -> Callable[..., RouterRecord]:
    def read(
        logits: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, length: int | None = None
    ) -> RouterRecord:
        did = control.did(layer.index) if control else (None, None, None, None)
        real = None
        if layer.part != "language":
            real = torch.ones(len(logits) // (length or len(logits)), length or len(logits), dtype=torch.bool)
            real = real.to(logits.device)
        return RouterRecord(layer.index, logits, weights, experts, layer.rule, *did, part=layer.part, own_real=real)

    return read


def with_absent(
    records: Sequence[RouterRecord], layers: Sequence[MoeLayer], dtype: torch.dtype, device: torch.device
) -> list[RouterRecord]:
    """Add records without a token of routers that did not run, as those of an encoder do not where a pass has no image.

    All passes and ranks then have sums of the same losses and layers. Records come in the order of layers.
    """
    ran = {record.layer for record in records}
    found = list(records)
    for layer in layers:
        if layer.index not in ran:
            columns = layer.rule.top_k or 1
            logits, weights = (torch.zeros(0, n, dtype=dtype, device=device) for n in (layer.rule.experts, columns))
            ids = torch.zeros(0, columns, dtype=torch.int64, device=device)
            real = torch.zeros(0, 1, dtype=torch.bool, device=device)
            found.append(RouterRecord(layer.index, logits, weights, ids, layer.rule, part=layer.part, own_real=real))
    return sorted(found, key=lambda record: record.layer)


def watch_router(
    recorder: Recorder[Recorded],
    block: nn.Module,
    router: nn.Module,
    read: Callable[..., Recorded],
    lengths: bool = False,
) -> None:
    """Record ``read(logits, weights, experts)`` of a router, ``[T, E]`` and twice ``[T, K]``, whoever made its ``block``.

    With ``lengths``, a router of upcycle's own block also hands on the ``length`` of a sequence, or of an image in patches.
    """
    of_parallel = read_router(block) if is_parallel(block) else None

    def hook(inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Recorded:
        if lengths and isinstance(block, MoeBlock):
            return read(*output, length=inputs[1])
        return read(*(of_parallel(output) if of_parallel else output))

    recorder.watch(router, hook)
