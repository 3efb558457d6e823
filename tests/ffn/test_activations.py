"""Passes over a layer's tokens: which batches they give, and what is kept between them."""

from __future__ import annotations

import pytest
import torch

from upcycle.ffn.activations import HELD_OUT_EVERY, Activations, ExpertActivations
from upcycle.ffn.feed_forward import FeedForward

D, F, BATCH, BATCHES = 6, 10, 4, 20


def layer() -> FeedForward:
    rng = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((F, D), (F, D), (D, F)))
    return FeedForward(3, gate, up, down, torch.ones(D), "silu")


class Counted(Activations):
    """Counts how many batches are computed."""

    computed = 0

    def _batch(self, given):  # type: ignore[no-untyped-def]
        self.computed += 1
        return super()._batch(given)


def activations(cache_bytes: int = 0) -> Counted:
    x = torch.arange(BATCH * BATCHES, dtype=torch.float32)[:, None].expand(-1, D) / 100
    made = Counted.of(layer(), x, batch=BATCH, cache_bytes=cache_bytes)
    assert isinstance(made, Counted)
    return made


def numbers(batches) -> list[int]:  # type: ignore[no-untyped-def]
    return [round(batch.x[0, 0].item() * 100) // BATCH for batch in batches]


ONE = 4 * BATCH * (D + F)


@pytest.mark.parametrize("room", [0, 7 * ONE, BATCHES * ONE])
def test_every_pass_gives_the_same_in_the_same_order_and_keeps_what_there_is_room_for(room: int) -> None:
    given = activations(room)
    first = [batch.hidden for batch in given.batches()]
    assert numbers(given.batches()) == list(range(BATCHES))
    assert all(torch.equal(a, b.hidden) for a, b in zip(first, given.batches(), strict=True))
    assert given.computed == BATCHES + 2 * (BATCHES - room // ONE)


@pytest.mark.parametrize("room", [0, BATCHES * ONE])
@pytest.mark.parametrize("complete", [False, True])
def test_some_are_evenly_spread_and_hold_out_as_many(room: int, complete: bool) -> None:
    given = activations(room)
    if complete:
        list(given.batches())
    half = list(given.some(BATCH * BATCHES // 2))
    assert numbers(half) == [0, 2, 4, 6, 9, 11, 13, 15, 16, 18]
    assert [n for n, batch in zip(numbers(half), half, strict=True) if batch.held_out] == [15]
    assert numbers(given.some(10**6)) == list(range(BATCHES))
    assert numbers(given.some(1)) == [0]


@pytest.mark.parametrize("room", [0, BATCHES * ONE])
def test_judged_are_the_held_out_ones_or_all(room: int) -> None:
    assert numbers(activations(room).judged()) == [7, 15]
    few = Activations.of(layer(), torch.ones(BATCH * (HELD_OUT_EVERY - 1), D), batch=BATCH, cache_bytes=room)
    assert len(list(few.judged())) == HELD_OUT_EVERY - 1


@pytest.mark.parametrize("room", [0, 7 * ONE, BATCHES * ONE])
def test_expert_activations_take_over_what_is_kept(room: int) -> None:
    given = activations(room)
    expected = [2 * batch.hidden for batch in given.batches()]
    active = ExpertActivations(given, lambda batch: 2 * batch.hidden)
    for _ in range(2):
        assert all(torch.equal(a, b.hidden) for a, b in zip(expected, active.batches(), strict=True))
    everything = room == BATCHES * ONE
    assert given.computed == (BATCHES if everything else 3 * BATCHES - 2 * (room // ONE))
    # What was given up is computed again when it is asked for.
    assert numbers(given.batches()) == list(range(BATCHES))
    assert active.layer == 3
