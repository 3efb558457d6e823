"""Ranks that add up, agree, and fail together; the exchange with others is made up here, and real in test_ranks.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.trainers.distributed import ranks
from upcycle.trainers.distributed.ranks import Ranks, import_deepspeed, lost_ranks, process_group

CPU = torch.device("cpu")


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], Ranks]:
    """Return the second of two ranks, whose exchanges return the listed values."""

    def make(everyone: list[Any]) -> Ranks:
        def gather(found: list[Any], value: Any) -> None:
            found[:] = [theirs if theirs is not ... else value for theirs in everyone]

        monkeypatch.setattr(ranks.distributed, "all_gather_object", gather)
        return Ranks(1, 2, CPU)

    return make


def test_alone_nothing_is_exchanged() -> None:
    alone = Ranks(0, 1, CPU)
    assert alone.first
    assert alone.sums(1.5, 2) == [1.5, 2.0]
    assert alone.maximum(3) == [3.0]
    alone.barrier()
    alone.require_same("anything", object())
    alone.raise_together(None)
    with pytest.raises(UsageError, match="mine"):
        alone.raise_together(UsageError("mine"))


def test_disagreement_names_the_key(second_of_two: Callable[[list[Any]], Ranks]) -> None:
    second_of_two([1, ...]).require_same("numbers", 1)
    with pytest.raises(UsageError, match="ranks disagree about the recipe \\(seed\\): rank 0 has 3, rank 1 has 4"):
        second_of_two([{"model": 1, "seed": 3}, ...]).require_same("the recipe", {"model": 1, "seed": 4})


def test_a_failure_on_one_rank_is_raised_on_all(second_of_two: Callable[[list[Any]], Ranks]) -> None:
    told = (EnvironmentFault, "the disk is full", "make room")
    with pytest.raises(EnvironmentFault, match="rank 0: the disk is full") as error:
        second_of_two([told, ...]).raise_together(None)
    assert error.value.hint == "make room"
    own = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        second_of_two([told, ...]).raise_together(own)
    second_of_two([None, ...]).raise_together(None)


@pytest.mark.parametrize(
    "message", ["[gloo] Connection closed by peer [127.0.0.1]:1", "Timed out waiting 1000ms for recv"]
)
def test_a_lost_rank_is_named_in_the_error(message: str) -> None:
    with pytest.raises(EnvironmentFault, match="another rank was lost") as error, lost_ranks():
        raise RuntimeError(message)
    assert error.value.hint
    assert "to continue from the last checkpoint" in error.value.hint
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks():
        raise RuntimeError("shapes do not fit")


def test_incomplete_launch_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(ranks.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EnvironmentFault, match="RANK, MASTER_ADDR, MASTER_PORT is not set"), process_group(1):
        pass


def test_training_without_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EnvironmentFault, match="training needs DeepSpeed") as error:
        import_deepspeed()
    assert error.value.hint == "pip install 'upcycle[train]'"
    assert issubclass(EnvironmentFault, UpcycleError)
