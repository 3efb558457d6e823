"""Losses over a vocabulary, a few positions at a time, so that what is made on the way stays in the processor's cache.

Whole, a pass of 4,096 tokens over 150,000 logits makes several tensors of 2.5 GB each in fp32. Only the gradient is whole here, in
the logits' dtype: the backward pass makes the probabilities again, which takes less time than to store and to read them.
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from upcycle.trainers.routing.routing_rule import widened

NO_TARGET = -100
_ON_CPU, _ELSEWHERE = 1 << 20, 1 << 26  # logits at a time: those that fit in a core's cache, or that keep a device busy


def token_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``-log p`` of every target in nats, ``[...]`` in at least fp32; 0 where the target is :data:`NO_TARGET`.

    Args:
        logits: ``[..., V]``, any floating dtype.
        targets: int64 ``[...]``.
    """
    found: torch.Tensor = _TokenNats.apply(logits, targets)  # type: ignore[no-untyped-call]
    return found


def divergences(student: torch.Tensor, parent: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """``KL(parent || student)`` in nats of every position, ``[...]`` in at least fp32, of both logits over ``temperature``.

    Args:
        student: its logits ``[..., V]`` or longer, any floating dtype; those beyond V do not count.
        parent: its logits ``[..., V]``; their gradient is not computed.
    """
    found: torch.Tensor = _Divergences.apply(student, parent, temperature)  # type: ignore[no-untyped-call]
    return found


def _rows(tensor: torch.Tensor, axes: int) -> torch.Tensor:
    """A view with two axes of positions, whatever there was, before ``axes`` others."""
    positions = tensor.dim() - axes
    if positions < 2:
        return tensor[(None,) * (2 - positions)]
    return tensor.flatten(0, positions - 2)


def _blocks(logits: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Places of few enough positions, which can be read from a part of a larger tensor without a copy."""
    batch, length, vocabulary = logits.shape
    step = max(1, (_ON_CPU if logits.device.type == "cpu" else _ELSEWHERE) // vocabulary)
    for row in range(batch):
        for first in range(0, length, step):
            yield row, slice(first, first + step)


class _TokenNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, targets)
        rows, wanted = _rows(logits, 1), _rows(targets, 0)
        nats = rows.new_empty(wanted.shape, dtype=widened(logits[:0]).dtype)
        for place in _blocks(rows):
            nats[place] = torch.nn.functional.cross_entropy(
                widened(rows[place]), wanted[place], reduction="none", ignore_index=NO_TARGET
            )
        return nats.view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets = ctx.saved_tensors
        made = torch.empty_like(logits)
        rows, wanted, out = _rows(logits, 1), _rows(targets, 0), _rows(made, 1)
        scale = _rows(grads[0].masked_fill(targets == NO_TARGET, 0.0), 0)
        for place in _blocks(rows):
            share = widened(rows[place]).softmax(-1)
            index = wanted[place].clamp(min=0)[:, None]
            share.scatter_add_(1, index, share.new_full((), -1.0).expand(index.shape))
            out[place] = share.mul_(scale[place][:, None])
        return made, None


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, parent: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.save_for_backward(student, parent)
        ctx.temperature, known = temperature, parent.shape[-1]
        given, wanted = _rows(student, 1), _rows(parent, 1)
        found = given.new_empty(given.shape[:-1], dtype=widened(student[:0]).dtype)
        for place in _blocks(given):
            mine = (widened(given[place][:, :known]) / temperature).log_softmax(-1)
            theirs = (widened(wanted[place]).to(mine) / temperature).log_softmax(-1)
            found[place] = (mine.neg_().add_(theirs)).mul_(theirs.exp_()).sum(-1)
        return found.view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student, parent = ctx.saved_tensors
        known = parent.shape[-1]
        made = torch.empty_like(student)
        given, wanted, out = _rows(student, 1), _rows(parent, 1), _rows(made, 1)
        scale = _rows(grads[0] / ctx.temperature, 0)
        for place in _blocks(given):
            mine = (widened(given[place][:, :known]) / ctx.temperature).softmax(-1)
            theirs = (widened(wanted[place]).to(mine) / ctx.temperature).softmax(-1)
            out[place][:, :known] = mine.sub_(theirs).mul_(scale[place][:, None])
            out[place][:, known:] = 0.0
        return made, None, None
