"""Rows sorted by expert against loops, and every bad input."""

from __future__ import annotations

import pytest
import torch
from expert_cases import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.errors import UsageError
from upcycle.kernels.layout.dispatch import Dispatch, drop_overflow, route


def check(dispatch: Dispatch, owners: list[int], ids: list[int], experts: int) -> None:
    """``owners``: the token of every slot. Rows are the slots of expert 0 in their order, those of expert 1, and so on."""
    rows = [(slot, owners[slot]) for expert in range(experts) for slot, e in enumerate(ids) if e == expert]
    counts = [sum(e == expert for e in ids) for expert in range(experts)]
    assert dispatch.offsets.tolist() == [sum(counts[:expert]) for expert in range(experts + 1)]
    assert list(zip(dispatch.row_slot.tolist(), dispatch.row_token.tolist(), strict=True))[: len(rows)] == rows
    where = {slot: row for row, (slot, _) in enumerate(rows)}
    assert dispatch.slot_row.tolist() == [where.get(slot, -1) for slot in range(len(ids))]
    assert dispatch.slots == len(ids)
    assert dispatch.num_experts == experts
    for vector in (dispatch.row_slot, dispatch.row_token, dispatch.slot_row):
        assert vector.dtype == torch.int32
    assert dispatch.offsets.dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4), st.randoms(use_true_random=False))
def test_as_loops_say(experts: int, tokens: int, top_k: int, random: object) -> None:
    top_k = min(top_k, experts)
    draw = random.sample  # type: ignore[attr-defined]
    ids = [draw(range(experts + 2), top_k) for _ in range(tokens)]  # two ids that are nobody's
    owners = [token for token in range(tokens) for _ in range(top_k)]
    check(route(torch.tensor(ids), experts), owners, [e for row in ids for e in row], experts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 4), max_size=8), st.randoms(use_true_random=False))
def test_as_loops_say_for_any_number_of_experts_per_token(experts: int, numbers: list[int], random: object) -> None:
    ids = [random.randrange(experts + 1) for _ in range(sum(numbers))]  # type: ignore[attr-defined]
    bounds = torch.tensor([sum(numbers[:token]) for token in range(len(numbers) + 1)], dtype=torch.int32)
    owners = [token for token, number in enumerate(numbers) for _ in range(number)]
    dispatch = route(torch.tensor(ids, dtype=torch.int32), experts, bounds)
    check(dispatch, owners, ids, experts)
    assert (dispatch.tokens, dispatch.top_k) == (len(numbers), None)


def test_nothing_waits_for_the_device() -> None:
    """A device without values fails wherever one is read."""
    dispatch = route(torch.empty(6, 2, dtype=torch.long, device="meta"), 4, capacity=3)
    assert dispatch.row_token.shape == (12,)
    assert dispatch.offsets.shape == (5,)
    dynamic = route(torch.empty(9, dtype=torch.long, device="meta"), 4, torch.empty(4, dtype=torch.long, device="meta"))
    assert dynamic.tokens == 3


@pytest.mark.parametrize("capacity", [0, 1, 2, 5, 100])
def test_capacity_keeps_the_first_slots(capacity: int) -> None:
    ids = random_ids(16, 3, 5)
    ids[3, 1] = 5
    kept, used = [], [0] * 5
    for expert in ids.flatten().tolist():
        full = expert == 5 or used[expert] >= capacity
        kept.append(5 if full else expert)
        if not full:
            used[expert] += 1
    dropped = drop_overflow(ids, 5, capacity)
    assert dropped.flatten().tolist() == kept
    assert dropped.shape == ids.shape
    check(route(ids, 5, capacity=capacity), [token for token in range(16) for _ in range(3)], kept, 5)


def test_inputs_stay_as_they_are() -> None:
    ids = random_ids(8, 2, 4)
    before = ids.clone()
    route(ids, 3, capacity=1)
    assert torch.equal(ids, before)


def test_a_rank_with_few_of_the_experts_has_more_slots_than_experts() -> None:
    dispatch = route(torch.tensor([[2, 0, 2], [1, 2, 2]]), 2)
    assert dispatch.offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("ids", "experts", "offsets", "capacity", "message"),
    [
        ([[0]], 0, None, None, "num_experts is 0"),
        ([[0]], 1, None, -1, "capacity is -1"),
        ([[0.5]], 1, None, None, "expert ids are torch.float32"),
        ([0, 1], 2, None, None, r"shape \(2,\), not \[T, K\]"),
        ([[0, 1]], 2, [0, 2], None, r"not \[S\]"),
        ([[0, -1]], 2, None, None, "an expert id is negative"),
        ([[0, 1, 1]], 2, None, None, "a token has more than 2 experts"),
        ([0, 1], 2, [0.0, 2.0], None, "token_offsets are torch.float32"),
        ([0, 1], 2, [0, 1], None, "must rise from 0 to the number of slots, 2"),
        ([0, 1], 2, [1, 2], None, "must rise from 0"),
        ([0, 1], 2, [0, 2, 1, 2], None, "must rise from 0"),
        ([0, 1], 2, [], None, r"shape \(0,\)"),
    ],
)
def test_bad_input(ids: list, experts: int, offsets: list | None, capacity: int | None, message: str) -> None:
    bounds = None if offsets is None else torch.tensor(offsets, dtype=None if offsets else torch.long)
    with pytest.raises(UsageError, match=message):
        route(torch.tensor(ids), experts, bounds, capacity)


def test_another_device() -> None:
    with pytest.raises(UsageError, match="token_offsets are on meta"):
        route(torch.tensor([0]), 1, torch.empty(2, dtype=torch.long, device="meta"))


def test_more_slots_than_can_be_counted() -> None:
    with pytest.raises(UsageError, match="more than int32"):
        route(torch.empty(2**30, 2, dtype=torch.long, device="meta"), 4)
