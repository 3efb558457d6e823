"""Two ranks against one: the same curve however weights, states and experts are divided; and what a killed run leaves.

Every run is a process of its own, as users start them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import COMMAND, finish, losses, on_ranks, recipe_for, run, start, steps, two_ranks

from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.trainers.checkpoints.export import export
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.checkpoints.write import finished
from upcycle.trainers.recipe.training_recipe import TrainRecipe

Model = Callable[[str], Path]


def one_rank(model: Path, folder: Path, **changes: Any) -> TrainRecipe:
    recipe = recipe_for(model, folder, **changes)
    run(recipe)
    return recipe


def same_weights(one: Path, two: Path) -> float:
    """The largest difference between exported weights, relative to each tensor's largest number."""
    first, second = SafetensorsFolder(one), SafetensorsFolder(two)
    assert first.specs == second.specs
    found = 0.0
    for name in first.specs:
        a, b = first.read(name).double(), second.read(name).double()
        found = max(found, float((a - b).abs().max() / a.abs().max()))
    return found


@pytest.mark.long
def test_two_ranks_give_the_curve_of_one(pico_moe: Model, tmp_path: Path) -> None:
    balances = {"switch_balance": {"coefficient": 0.1}, "mutual_information": {"coefficient": 0.1}, "router_z": {}}
    alone = one_rank(pico_moe("mixtral"), tmp_path / "one", stage={"steps": 3, "losses": balances})
    both = two_ranks(alone, tmp_path / "two", zero={"stage": 2})
    on_ranks(both, 2)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    auxiliary = ("loss/switch_balance", "loss/mutual_information", "loss/router_z")
    for name, near in (*((name, 1e-6) for name in auxiliary), ("gradient_norm", 1e-4), ("load_max_over_mean", 1e-4)):
        wanted = [line[name] for line in steps(alone)]
        assert [line[name] for line in steps(both)] == [pytest.approx(value, rel=near) for value in wanted]
    saved = latest(Path(both.output))
    assert saved
    assert saved.state["world"] == 2
    export(both.output, tmp_path / "a")
    export(alone.output, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b") < 1e-3


@pytest.mark.slow
def test_the_shipped_heal_split_on_two_ranks(pico_moe: Model, tmp_path: Path) -> None:
    """Four passes of one rank, two of each of two: nothing but ``--nproc 2`` is another."""
    shipped = yaml.safe_load((Path(__file__).parents[3] / "configs" / "train" / "heal_split.yaml").read_text())
    (stage,) = shipped["stages"]
    keys = {**shipped, "stages": [{**stage, "tokens": 24 * 16 * 64}], "length": 64, "saving": {"export": False}}
    alone = one_rank(pico_moe("qwen2_moe"), tmp_path / "one", **keys)
    both = two_ranks(alone, tmp_path / "two")
    on_ranks(both, 2)
    assert len(losses(alone)) == 24
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    balance = [[line["loss/switch_balance"] for line in steps(recipe)] for recipe in (both, alone)]
    assert balance[0] == pytest.approx(balance[1], rel=1e-5)  # weights part by rounding from the second step on
    assert balance[0][0] == pytest.approx(balance[1][0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_zero_stage_gives_the_curve_of_one_rank(pico_moe: Model, tmp_path: Path, stage: int) -> None:
    alone = one_rank(pico_moe("qwen3_moe"), tmp_path / "one")
    both = two_ranks(alone, tmp_path / "two", zero={"stage": stage})
    on_ranks(both, 2)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_divided_experts_give_the_curve_of_one_rank(pico_moe: Model, tmp_path: Path, name: str, stage: int) -> None:
    alone = one_rank(pico_moe(name), tmp_path / "one")
    both = two_ranks(alone, tmp_path / "two", zero={"stage": stage}, expert_parallel=2)
    on_ranks(both, 2)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    export(both.output, tmp_path / "a")
    export(alone.output, tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b") < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2))])
def test_another_number_of_ranks_continues(
    pico_moe: Model, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    whole = one_rank(pico_moe("mixtral"), tmp_path / "whole")
    parts = two_ranks(whole, tmp_path / "parts", stages=[{**whole.stages[0].model_dump(mode="json")}])
    for (ranks, divided), stop in ((before, True), (after, False)):
        own = parts.model_copy(update={"expert_parallel": divided, "micro_batch": 2 // ranks})
        process = start(own, "--nproc", str(ranks))
        if stop:
            _signal_after(process, own, 2)
        finish(process, 130 if stop else 0)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def _signal_after(process: subprocess.Popen[str], recipe: TrainRecipe, step: int) -> None:
    log = Path(recipe.output) / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count('"step"') < step):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_run_killed_while_it_saves_continues_from_the_checkpoint_before(pico_moe: Model, tmp_path: Path) -> None:
    whole = one_rank(pico_moe("mixtral"), tmp_path / "whole")
    parts = whole.model_copy(update={"output": str(tmp_path / "parts")})
    process = start(parts)
    checkpoints = tmp_path / "parts" / "checkpoints"
    while process.poll() is None and not (checkpoints / "step-00000004.partial").exists():
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    assert [path.name for path in finished(tmp_path / "parts")] in (
        ["step-00000002"],
        ["step-00000002", "step-00000004"],
    )
    finish(start(parts))
    assert not list(checkpoints.glob("*.partial"))
    assert steps(parts) == steps(whole)


@pytest.mark.slow
def test_ranks_that_disagree_and_ranks_that_are_missing(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, micro_batch=1, timeout=20.0)
    other = recipe.model_copy(update={"seed": 1, "output": str(tmp_path / "other")})

    def ranks(recipes: list[TrainRecipe], port: int) -> list[tuple[int, str]]:
        processes = []
        for rank, own in enumerate(recipes):
            path = tmp_path / f"{port}-{rank}.yaml"
            path.write_text(own.dump())
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            processes.append(
                subprocess.Popen([*COMMAND, str(path)], stderr=subprocess.PIPE, text=True, env=environment)
            )
        return [(process.wait(), process.stderr.read() if process.stderr else "") for process in processes]

    from upcycle.trainers.distributed.launcher import _free_port

    for code, text in ranks([recipe, other], _free_port()):
        assert code == 2
        assert "ranks disagree about the recipe" in text
    ((code, text),) = ranks([recipe], _free_port())
    assert code == 4
    assert "rank 0 of 2 did not reach the others" in text


@pytest.mark.long
def test_a_failing_rank_ends_the_run_with_its_exit_code(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, micro_batch=4)
    process = start(recipe, "--nproc", "2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "global_batch 4 is not a multiple of micro_batch 4 x 2 ranks" in errors
