"""A rank without memory says which keys of the recipe would need less, and by how much."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run

from upcycle.errors import EnvironmentFault
from upcycle.trainers.run import out_of_memory
from upcycle.trainers.run.out_of_memory import keys_that_need_less, lighter
from upcycle.trainers.run.step import Stepper

Model = Callable[[str], Path]
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16777216 bytes."),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_run_names_keys_that_lower_the_need(
    error: Exception, pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(EnvironmentFault, match=r"the run is out of memory: .+") as caught:
        run(recipe_for(pico_moe("mixtral"), tmp_path / "run", micro_batch=4, length=256))
    assert "micro_batch: 2" in (caught.value.hint or "")


def test_what_is_named_needs_less_and_by_the_plan(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path / "run", micro_batch=4, global_batch=8, length=256)
    needed, *others = (float(number) for number in re.findall(r"([\d.]+) GB", keys_that_need_less(recipe, 1)))
    assert 0 < len(others) <= out_of_memory.KEYS_NAMED
    assert all(other <= needed for other in others)
    assert "per rank" in keys_that_need_less(recipe, 2)
    assert {"micro_batch: 2", "activation_checkpointing: true", "length: 128"} <= set(lighter(recipe, 1))
    assert "zero: {stage: 3}" in lighter(recipe, 2)


def test_without_a_plan_keys_are_named_all_the_same(
    pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(*_: Any) -> float:
        raise MemoryError

    monkeypatch.setattr(out_of_memory, "_planned", planned)
    assert "activation_checkpointing: true" in keys_that_need_less(recipe_for(pico_moe("mixtral"), tmp_path / "run"), 1)


def test_other_errors_are_what_they_are(pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(recipe_for(pico_moe("mixtral"), tmp_path / "run"))
