"""Validation measures the function that is trained, with what its routers' control does in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run

from upcycle.trainers.data.packing import PackedBatch, layout
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.losses.next_token import next_token_losses
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import capture
from upcycle.trainers.run.validation import validate

ALONE = Ranks(0, 1, torch.device("cpu"))
NORMALIZED = {"normalize_logits": 2.0, "accept_unexported": True}


def rows(length: int, used: int = 8) -> PackedBatch:
    """Two rows of one document each, and padding."""
    ids = torch.randint(4096, (2, used), generator=torch.Generator().manual_seed(5))
    positions, mask = map(torch.from_numpy, layout(torch.tensor([used]).numpy(), length))
    padded = torch.zeros(2, length, dtype=torch.long)
    padded[:, :used] = ids
    return PackedBatch(padded, mask.expand(2, -1), positions.expand(2, -1), ("a", "a"))


def validated(model: Any, batch: PackedBatch, **keys: Any) -> float:
    control = RouterControl(ControlParameters(**keys))
    with capture(model, control):
        found = validate(model, {"a": [batch]}, ALONE, control)["a"]
    control.detach()
    return found


def test_normalised_logits_are_validated_as_they_are_trained(stock: Any) -> None:
    model, batch = stock("mixtral").train(), rows(8)
    control = RouterControl(ControlParameters(**NORMALIZED))
    with capture(model, control), torch.no_grad():
        logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    control.detach()
    trained = (next_token_losses(logits, batch.ids) * batch.mask[:, 1:]).sum() / batch.mask.sum()
    found = validated(model, batch, **NORMALIZED)
    assert found == pytest.approx(trained.item(), rel=1e-6)
    assert abs(found - validated(model, batch)) > 1e-3
    assert model.training


def test_a_capacity_in_evaluation_is_the_rows_own(stock: Any) -> None:
    model = stock("mixtral")
    keys = {"evaluation_capacity_factor": 0.5, "min_capacity": 1}
    short, long = (validated(model, rows(length), **keys) for length in (8, 30))
    assert short == pytest.approx(long, rel=1e-5)
    assert abs(short - validated(model, rows(8))) > 1e-3


def test_a_run_validates_with_the_control_it_trains_with(pico_moe: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from upcycle.trainers.run import loop

    given: list[Any] = []

    def spy(*arguments: Any) -> dict[str, float]:
        given.append(arguments[3])
        return validate(*arguments)

    stage = {"steps": 1, "losses": {}, "control": {"evaluation_capacity_factor": 0.5}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validate", spy)
        run(recipe_for(pico_moe("mixtral"), tmp_path, stage=stage, log={"validation": 1}))
    assert len(given) == 2
    assert all(each.parameters == ControlParameters(evaluation_capacity_factor=0.5) for each in given)
    assert given[0]._real is not None
