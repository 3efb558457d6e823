"""What a router chose, and which tokens each expert computes, as index vectors that kernels read.

T tokens, K experts per token, S slots, E experts.

A *slot* is one (token, expert) pair in the order the router gave it: T K of them where every token has K experts, any number
per token where ``token_offsets`` says whose they are. A *row* is the same pair sorted by expert. Nothing here waits for the
device: all sizes are known from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from upcycle.errors import UsageError

_INTEGERS = (torch.int32, torch.int64)


class RouterChoice(NamedTuple):
    """What a router chose for all tokens. A tuple, because compilers look through one, and it is made for every token."""

    experts: torch.Tensor
    """Ids ``[T, K]``, or ``[S]`` with ``token_offsets``; E and more: the slot is dropped."""
    scores: torch.Tensor | None = None
    """Like ``experts``, floating; ``None``: all 1."""
    token_offsets: torch.Tensor | None = None
    """``[T + 1]``: token t has the slots from its entry to the next one; ``None``: K each."""
    capacity: int | None = None
    """How many slots an expert computes at most; ``None``: all."""

    def dispatch(self, num_experts: int) -> Dispatch:
        """The slots sorted by expert; see :func:`route`."""
        return route(self.experts, num_experts, self.token_offsets, self.capacity)


@dataclass(frozen=True)
class Dispatch:
    """Slots sorted by expert (a stable sort), and the way back.

    Rows from ``offsets[E]`` on belong to dropped slots (ids of E or more): kernels neither read nor write anything for them.
    """

    row_token: torch.Tensor
    """int32 ``[S]``: the token of every row."""
    row_slot: torch.Tensor
    """int32 ``[S]``: the slot of every row."""
    slot_row: torch.Tensor
    """int32 ``[S]``: the row of every slot, -1 where it is dropped."""
    offsets: torch.Tensor
    """int64 ``[E + 1]``: expert e has the rows ``offsets[e]`` to ``offsets[e + 1]``."""
    token_offsets: torch.Tensor | None
    """int64 ``[T + 1]``: token t has the slots from its entry to the next one; ``None``: ``top_k`` each."""
    tokens: int
    """T, the number of tokens."""
    top_k: int | None
    """K, experts per token; ``None`` where tokens have different numbers of them."""

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return self.offsets.shape[0] - 1  # ``len`` of a tensor takes ten times as long

    @property
    def slots(self) -> int:
        """S; buffers have room for as many rows."""
        return self.row_slot.shape[0]


def route(
    experts: torch.Tensor,
    num_experts: int,
    token_offsets: torch.Tensor | None = None,
    capacity: int | None = None,
) -> Dispatch:
    """Slots sorted by expert.

    Args:
        experts: int32 or int64 ids, ``[T, K]``, or ``[S]`` with ``token_offsets``. Ids of ``num_experts`` or more are
            sentinels: dropped, or another rank's.
        num_experts: E.
        token_offsets: ``[T + 1]``, rising from 0 to S: token t has the slots from its entry to the next one, or none.
        capacity: how many slots an expert computes at most (see :func:`drop_overflow`); ``None``: all.

    Raises:
        UsageError: a shape or dtype does not fit, there are no experts, an id is negative, or a token has more experts than
            there are. (On a device other than the CPU the last two, and the values of ``token_offsets``, stop the device.)
    """
    _check(experts, num_experts, token_offsets, capacity)
    flat = experts.reshape(-1)
    if capacity is not None:
        flat = drop_overflow(flat, num_experts, capacity)
    ids = flat.clamp(max=num_experts)
    sorted_ids, order = torch.sort(ids, stable=True)
    bounds = torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(sorted_ids, bounds)
    rows = torch.arange(len(flat), device=ids.device, dtype=torch.int32)
    kept = torch.where(rows < offsets[-1], rows, -1)
    slot_row = torch.empty_like(rows).index_copy_(0, order, kept)
    if token_offsets is None:
        tokens, top_k = experts.shape
        row_token = order // max(top_k, 1)
        _check_repeats(flat, tokens, top_k, num_experts)
        return Dispatch(row_token.int(), order.int(), slot_row, offsets, None, tokens, top_k)
    starts = token_offsets.long()
    row_token = torch.searchsorted(starts, order, right=True) - 1
    return Dispatch(row_token.int(), order.int(), slot_row, offsets, starts, len(starts) - 1, None)


def drop_overflow(experts: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    """The ids with ``num_experts`` in place of those beyond an expert's first ``capacity`` slots, in the slots' order.

    Args:
        experts: ids of any shape; slots are counted in its row-major order.
        num_experts: E.
        capacity: slots per expert, at least 0.
    """
    ids = experts.reshape(-1).clamp(max=num_experts)
    sorted_ids, order = torch.sort(ids, stable=True)
    first = torch.searchsorted(sorted_ids, sorted_ids)
    place = torch.arange(len(ids), device=ids.device) - first
    kept = torch.where(place < capacity, sorted_ids, num_experts)
    return torch.empty_like(ids).index_copy_(0, order, kept).view_as(experts)


def _check(experts: torch.Tensor, num_experts: int, token_offsets: torch.Tensor | None, capacity: int | None) -> None:
    if num_experts < 1:
        raise UsageError(f"num_experts is {num_experts}: there must be at least one expert")
    if capacity is not None and capacity < 0:
        raise UsageError(f"capacity is {capacity}: it must be at least 0, or None for no limit")
    if experts.dtype not in _INTEGERS:
        raise UsageError(f"expert ids are {experts.dtype}", hint="give int64 or int32 ids, as torch.topk returns them")
    if experts.numel() >= 2**31:
        raise UsageError(f"{experts.numel():,} slots are more than int32 can count", hint="split the batch")
    dims = 2 if token_offsets is None else 1
    if experts.ndim != dims:
        shape = "[T, K], or [S] with token_offsets" if dims == 2 else "[S] when token_offsets is given"
        raise UsageError(f"expert ids have the shape {tuple(experts.shape)}, not {shape}")
    _require(experts >= 0, "an expert id is negative", "ids are 0 to E - 1; use E for a slot that is dropped")
    if token_offsets is None:
        return
    if token_offsets.dtype not in _INTEGERS or token_offsets.ndim != 1 or len(token_offsets) < 1:
        raise UsageError(
            f"token_offsets are {token_offsets.dtype} of the shape {tuple(token_offsets.shape)}, not integers [T + 1]"
        )
    if token_offsets.device != experts.device:
        raise UsageError(f"token_offsets are on {token_offsets.device}, the expert ids on {experts.device}")
    ends = (token_offsets[0] == 0) & (token_offsets[-1] == len(experts)) & (token_offsets.diff() >= 0).all()
    _require(ends, f"token_offsets must rise from 0 to the number of slots, {len(experts)}", None)


def _check_repeats(flat: torch.Tensor, tokens: int, top_k: int, num_experts: int) -> None:
    """Check that no token has more experts than there are. More slots are fine: a rank that has few of the experts gets sentinels."""
    if top_k > num_experts:
        valid = (flat.view(tokens, top_k) < num_experts).sum(1)
        _require(
            valid <= num_experts, f"a token has more than {num_experts} experts, and there are {num_experts}", None
        )


def _require(condition: torch.Tensor, message: str, hint: str | None) -> None:
    """Check a condition on values: by an error on a CPU, elsewhere by a trap on the device, for which the host does not wait."""
    if condition.device.type == "cpu":
        if not bool(condition.all()):
            raise UsageError(message, hint=hint)
    elif condition.device.type != "meta":
        torch._assert_async(condition.all(), message)
