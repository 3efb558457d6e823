"""Which experts a layer keeps, against least recently used written down again, and what guesses may and may not do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from threading import Event, get_ident

import pytest
import torch

from upcycle.errors import CheckpointError
from upcycle.inference.offloading.expert_cache import ExpertCache
from upcycle.inference.offloading.loading import ExpertLoad, Loader

Made = Callable[..., ExpertCache]


def content(layer: int, expert: int) -> int:
    return 16 * layer + expert


@pytest.fixture
def cache() -> Iterator[Made]:
    loaders = []

    def make(
        places: list[int], ahead: int, threads: int = 2, before: Callable[[int, int], None] = lambda *_: None
    ) -> ExpertCache:
        loaders.append(Loader(threads))

        def read(layer: int, expert: int, buffer: torch.Tensor) -> Callable[[], None]:
            def fill() -> None:
                before(layer, expert)
                buffer.fill_(content(layer, expert))

            return fill

        return ExpertCache(places, ahead, lambda: torch.empty(8, dtype=torch.uint8), read, loaders[-1])

    yield make
    for loader in loaders:
        loader.close()


def run_pass(cache: ExpertCache, layer: int, chosen: dict[int, int], tokens: int = 1) -> None:
    cache.begin(layer, chosen, tokens)
    for expert in chosen:
        for _ in range(2):  # each of its matrices
            assert cache.fetch(layer, expert).tolist() == [content(layer, expert)] * 8
    cache.end(layer)


@pytest.mark.parametrize("threads", [0, 2])
def test_what_was_used_longest_ago_goes(cache: Made, threads: int) -> None:
    """300 tokens of 3 experts each: the layers keep what a list of the last used keeps, and as many are hits."""
    made, draw = cache([4, 5], ahead=2, threads=threads), random.Random(0)
    lists: list[list[int]] = [[], []]
    hits = 0
    for _ in range(300):
        for layer, room in enumerate((4, 5)):
            chosen = sorted(draw.sample(range(8), 3))
            hits += sum(expert in lists[layer] for expert in chosen)
            run_pass(made, layer, dict.fromkeys(chosen, 0))
            for expert in chosen:
                if expert in lists[layer]:
                    lists[layer].remove(expert)
                elif len(lists[layer]) == room:  # what the token still needs is the last to go
                    lists[layer].remove(next(old for old in lists[layer] if old not in chosen))
                lists[layer].append(expert)
            assert made.held(layer) == lists[layer]
    assert made.written.hits == hits
    assert made.written.total == 300 * 6
    assert made.loads == made.written.misses == 1800 - hits


def test_of_a_prompt_the_experts_of_its_last_tokens_stay(cache: Made) -> None:
    made = cache([3], ahead=2)
    last = {0: 9, 1: 2, 2: 7, 3: 0, 4: 8, 5: 1, 6: 3, 7: 4}
    run_pass(made, 0, last, tokens=10)
    assert {0, 4} < set(made.held(0))  # the third place is that of whatever came last
    assert made.loads == 8  # each once
    run_pass(made, 0, {1: 0})
    assert {0, 1, 4} == set(made.held(0))  # a written token is later than all of the prompt's


def test_one_place_is_enough_for_any_prompt(cache: Made) -> None:
    made = cache([1], ahead=0)
    run_pass(made, 0, {expert: expert for expert in range(8)}, tokens=8)
    run_pass(made, 0, {0: 0, 7: 0})
    assert (made.prompt.misses, made.written.hits) == (8, 1)
    assert made.loads == 10  # 7 had to make room for 0


def test_a_guess_waits_outside_until_it_is_used(cache: Made) -> None:
    made = cache([2, 2], ahead=2)
    run_pass(made, 1, {0: 0, 1: 0})
    made.guess(1, [5, 6, 7])  # there are two buffers
    assert made.held(1) == [0, 1]
    run_pass(made, 1, {1: 0, 5: 0})
    assert made.held(1) == [1, 5]  # 0 gave way to the right guess alone
    assert (made.written.hits, made.written.guessed, made.written.misses, made.wrong_guesses) == (1, 1, 2, 1)
    made.guess(1, [2, 3])
    run_pass(made, 0, {0: 0, 4: 0})  # what is needed takes the guesses' buffers
    assert made.held(1) == [1, 5]
    run_pass(made, 1, {2: 0, 3: 0})
    assert made.held(1) == [2, 3]


def test_guesses_change_no_content_whatever_they_are(cache: Made) -> None:
    made, draw = cache([3, 2, 3], ahead=3), random.Random(1)
    for _ in range(200):
        for layer in range(3):
            chosen = dict.fromkeys(sorted(draw.sample(range(8), 2)), 0)
            made.begin(layer, chosen, 1)
            made.guess((layer + 1) % 3, draw.sample(range(8), 3))
            for expert in chosen:
                assert made.fetch(layer, expert).tolist() == [content(layer, expert)] * 8
            made.end(layer)
    assert made.written.guessed
    assert made.wrong_guesses


def test_an_error_of_a_load_reaches_who_needs_it_and_nobody_else(cache: Made) -> None:
    def broken(layer: int, expert: int) -> None:
        if expert == 3:
            raise CheckpointError("the file is gone")

    made = cache([2, 2], ahead=2, before=broken)
    made.guess(1, [3])
    run_pass(made, 1, {0: 0})
    with pytest.raises(CheckpointError, match="gone"):
        run_pass(made, 1, {0: 0, 3: 0})


def test_urgent_loads_go_first_and_waiting_ones_can_be_taken_back() -> None:
    loader, order, began, gate = Loader(1), [], Event(), Event()

    def first() -> None:
        began.set()
        gate.wait()
        order.append("first")

    names = ("guess", "guess too", "hurried", "needed")
    loads = {name: ExpertLoad(partial(order.append, name)) for name in names}
    loader.submit(ExpertLoad(first), urgent=True)
    began.wait()
    for name in names[:3]:
        loader.submit(loads[name], urgent=False)
    loader.submit(loads["needed"], urgent=True)
    loader.hurry(loads["hurried"])
    assert loader.take_back(loads["guess too"])
    gate.set()
    loads["guess"].result()
    loader.close()
    assert order == ["first", "needed", "hurried", "guess"]


def test_a_load_that_has_not_begun_runs_where_it_is_waited_for() -> None:
    loader, ran = Loader(0), []
    load = ExpertLoad(lambda: ran.append(get_ident()))
    loader.submit(load, urgent=False)
    loader.finish(load)
    assert ran == [get_ident()]
