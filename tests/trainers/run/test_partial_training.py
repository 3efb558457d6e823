"""What may train in a stage times how DeepSpeed divides it: the same losses as undivided, whatever trains alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import losses, on_ranks, recipe_for, run, start, two_ranks

from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.trainers.checkpoints.read import latest

Model = Callable[[str], Path]
TRAINED = {
    "router": ["router"],
    "experts": ["experts"],
    "both": ["router", "experts"],
    "rest": ["rest"],
    "last experts": ["*.layers.1.*experts*"],
    "head": ["lm_head*"],
    "norms": ["*norm*"],
    "all": ["all"],
}
QUICK = ("router", "experts")


def weights(recipe: Any) -> SafetensorsFolder:
    saved = latest(Path(recipe.output))
    assert saved
    return SafetensorsFolder(saved.folder)


def cells() -> list[Any]:
    quick = [(name, 3, {}) for name in QUICK]
    others = [(name, zero, {}) for name in TRAINED for zero in (1, 2, 3) if (name, zero, {}) not in quick]
    others += [("router", 3, {"activation_checkpointing": True}), ("both", 3, {"dtype": "bfloat16"})]
    return [*quick, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in others)]


@pytest.mark.long
@pytest.mark.parametrize(("name", "zero", "more"), cells())
def test_one_rank_trains_the_same_part_under_every_stage(
    pico_moe: Model, tmp_path: Path, name: str, zero: int, more: dict[str, Any]
) -> None:
    stage = {"steps": 2, "train": TRAINED[name], "learning_rate": 0.1}
    # Steps of SGD are as exact as the gradients are; Adam's roots enlarge rounding.
    exact: dict[str, Any] = {"optimizer": {"name": "sgd"}, "saving": {"every": 9}}
    alone = recipe_for(pico_moe("mixtral"), tmp_path / "a", stage=stage, **exact)
    run(alone)
    other = recipe_for(pico_moe("mixtral"), tmp_path / "b", stage=stage, zero={"stage": zero}, **{**exact, **more})
    run(other.model_copy(update={"data": alone.data}))
    assert losses(other) == pytest.approx(losses(alone), rel=2e-2 if "dtype" in more else 1e-5)
    if "dtype" in more:
        return
    before = SafetensorsFolder(pico_moe("mixtral", fused=True))  # type: ignore[call-arg]
    one, two = weights(alone), weights(other)
    for key in one.specs:
        assert (one.read(key) - two.read(key)).abs().max() <= 1e-6, key
        assert one.read(key).equal(before.read(key)) == two.read(key).equal(before.read(key)), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["router", "experts", "both"])
@pytest.mark.parametrize(("zero", "divided"), [(0, 1), (3, 1), (2, 2), (3, 2)])
def test_two_ranks_train_the_same_part_as_one(
    pico_moe: Model, tmp_path: Path, name: str, zero: int, divided: int
) -> None:
    alone = recipe_for(pico_moe("mixtral"), tmp_path / "one", stage={"steps": 2, "train": TRAINED[name], "losses": {}})
    run(alone)
    both = two_ranks(alone, tmp_path / "two", zero={"stage": zero}, expert_parallel=divided)
    if divided > 1 and name == "router" and zero < 3:
        _, errors = start(both, "--nproc", "2").communicate(timeout=240)
        assert "no expert trains, and below ZeRO's stage 3 DeepSpeed's AutoEP needs one that does" in errors
        return
    on_ranks(both, 2)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
