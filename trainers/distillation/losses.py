"""Distillation losses on the dense parent's logits, hidden states and FFN outputs.

B sequences, S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.architectures.module_paths import module_paths_of
from upcycle.errors import UsageError
from upcycle.trainers.distillation.massive_activations import token_weights
from upcycle.trainers.distillation.truncated_logits import TopLogits
from upcycle.trainers.losses.vocabulary import divergences
from upcycle.trainers.recipe.part_recipes import DistillationParameters
from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.routing_rule import widened


@dataclass(frozen=True)
class OutputRecord:
    """The output ``[B, S, D]``, with gradients, of a decoder layer or (``block``) of one of the blocks that make up its FFN."""

    layer: int
    block: bool
    value: torch.Tensor


@dataclass(frozen=True)
class LayerOutput:
    """The output of one decoder layer, and that of its FFN with all its blocks added up; ``[B, S, D]`` both."""

    layer: int
    hidden: torch.Tensor
    ffn: torch.Tensor


def logits_kl(
    student: torch.Tensor,
    parent: torch.Tensor | TopLogits,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Mean over positions of ``KL(parent || student)`` in nats, times ``temperature ** 2`` (Hinton et al., arXiv 1503.02531).

    Its gradient is that of LLaVA-MoD's cross-entropy with the parent's probabilities (arXiv 2408.15881), from which it differs
    by the parent's entropy. If the student's vocabulary is longer (padded), it is cut to the parent's.

    Args:
        student: its logits ``[..., V]``, any floating dtype; computed in at least fp32.
        parent: its logits ``[..., V]``, or cached ones (:meth:`TopLogits.kl` describes how their tail counts).
        mask: bool ``[...]``, the positions that count; ``None``: all.
        temperature: both logits are divided by it; 1 for cached ones.

    Raises:
        UsageError: a temperature other than 1 with cached logits, or a student with fewer tokens than the parent.
    """
    if isinstance(parent, TopLogits):
        if temperature != 1:
            raise UsageError(
                f"distillation.temperature: {temperature}, but cached logits hold probabilities at temperature 1",
                hint="set temperature to 1, or distil from the running parent",
            )
        return mean_over(parent.kl(student), mask)
    if student.shape[-1] < parent.shape[-1]:
        raise UsageError(
            f"the parent predicts {parent.shape[-1]} tokens and the student {student.shape[-1]}",
            hint="distil from the model that was converted: both must share a vocabulary",
        )
    return temperature**2 * mean_over(divergences(student, parent.detach(), temperature), mask)


def relative_error(student: torch.Tensor, parent: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``sum w |s - p|^2 / sum w |p|^2`` over the positions that count: relative, so that large outputs count no more than small ones.

    The weights ``w`` are 1, and less where ``p`` is massive beside the other positions of its row
    (:func:`upcycle.trainers.distillation.massive_activations.token_weights`): else such a position were all that is learned.

    Args:
        student: ``[..., S, D]``, any floating dtype; computed in at least fp32.
        parent: the same; its gradient is not computed.
        mask: bool ``[..., S]``; ``None``: all positions.
    """
    p = widened(parent.detach())
    weights = _weights(p, mask)
    return _size(widened(student) - p, weights) / _positive(_size(p, weights))


def mean_over(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of ``values`` where ``mask`` is true, or 0 if it is true nowhere; without a mask, of all values."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


def matching(
    parameters: DistillationParameters,
    student: Sequence[LayerOutput],
    parent: Sequence[LayerOutput],
    mask: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The weighted losses ``hidden`` and ``ffn``: :func:`relative_error`, averaged over layers. Losses of weight 0 are left out.

    Args:
        parameters: the weights.
        student: its layers' outputs.
        parent: the dense model's.
        mask: bool ``[B, S]``, the positions that count; ``None``: all.
        sizes: :func:`parent_sizes` of all the tokens that these are a part of. The losses then are these tokens' shares, which add up
            to the relative error of all. ``None``: these are all the tokens.

    Raises:
        UsageError: the two models have different numbers of layers.
    """
    if len(student) != len(parent):
        raise UsageError(
            f"the parent has {len(parent)} layers and the student {len(student)}",
            hint="set distillation.hidden and ffn only with the model that was converted as parent",
        )
    sizes = parent_sizes(parameters, parent, mask) if sizes is None else sizes
    found = {}
    for (what, weight), of_layers in zip(_matched(parameters), sizes, strict=True):
        pairs = [
            (getattr(mine, what), getattr(theirs, what).detach()) for mine, theirs in zip(student, parent, strict=True)
        ]
        errors = [_size(widened(mine) - widened(theirs), _weights(widened(theirs), mask)) for mine, theirs in pairs]
        together = torch.stack(errors)
        found[what] = weight * (together / _positive(of_layers.to(together))).mean()
    return found


@torch.no_grad()
def parent_sizes(
    parameters: DistillationParameters, parent: Sequence[LayerOutput], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The denominators of :func:`matching`: ``sum w |p|^2`` of each matched output, ``[n, layers]`` in at least fp32.

    They are additive over rows, whose positions stay together however a batch is divided.
    """
    outputs = [[widened(getattr(layer, what)) for layer in parent] for what, _ in _matched(parameters)]
    return torch.stack([torch.stack([_size(p, _weights(p, mask)) for p in layers]) for layers in outputs])


def _matched(parameters: DistillationParameters) -> list[tuple[str, float]]:
    both = (("hidden", parameters.hidden), ("ffn", parameters.ffn))
    return [(what, weight) for what, weight in both if weight]


def _weights(parent: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return token_weights(parent.square().sum(-1), mask)


def _size(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values.square().sum(-1) * weights).sum()


def _positive(size: torch.Tensor) -> torch.Tensor:
    return size.clamp(min=torch.finfo(size.dtype).tiny)


def capture_outputs(model: Any) -> Recorder[OutputRecord]:
    """Start recording the outputs of every layer and of its FFN, in a stock dense model or a stock MoE one.

    The records keep these outputs in memory even with activation checkpointing.

    Raises:
        UsageError: a layer of ``model`` has no FFN where it should.
    """
    paths = module_paths_of(model.config)
    recorder: Recorder[OutputRecord] = Recorder(model)
    for index, layer in enumerate(paths.layers_in(model)):
        blocks = [layer.get_submodule(paths.ends)] if paths.ends else paths.blocks_in(layer)
        if not blocks:
            kind = model.config.model_type
            raise UsageError(f"cannot match the layers of a {kind} model", hint="distil its logits alone")
        for block in blocks:
            recorder.watch(block, _reader(index, True))
        recorder.watch(layer, _reader(index, False))
    return recorder


def layer_outputs(records: Sequence[OutputRecord]) -> list[LayerOutput]:
    """The records of :func:`capture_outputs` for one pass, combined layer by layer."""
    blocks: dict[int, list[torch.Tensor]] = {}
    found = []
    for record in records:
        if record.block:
            blocks.setdefault(record.layer, []).append(record.value)
        else:
            ffn = torch.stack(blocks[record.layer]).sum(0).view_as(record.value)  # OPT's FFNs read flat rows
            found.append(LayerOutput(record.layer, record.value, ffn))
    return found


def _reader(index: int, block: bool) -> Callable[[tuple[Any, ...], Any], OutputRecord]:
    def read(_: tuple[Any, ...], output: Any) -> OutputRecord:
        value = output[0] if isinstance(output, tuple) else output
        return OutputRecord(index, block, value.clone() if block else value)  # Falcon's layers add to it in place

    return read
