"""Four ranks on this machine's CPUs, started by torchrun, by DeepSpeed's launcher and by the command itself: the curve of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import losses, recipe_for, run, two_ranks

pytest.importorskip("deepspeed")

from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.distributed.launcher import _free_port
from upcycle.trainers.recipe.training_recipe import TrainRecipe

Model = Callable[[str], Path]
RANKS = 4
DIVISIONS: dict[str, dict[str, Any]] = {
    "torchrun": {"zero": {"stage": 3}, "expert_parallel": 2},
    "deepspeed": {"zero": {"stage": 2}, "expert_parallel": 4},
    "upcycle": {"zero": {"stage": 3}, "expert_parallel": 4},
}


def command(launcher: str, recipe: Path) -> list[str]:
    """What a user types."""
    python, port = [sys.executable, "-P"], str(_free_port())
    ours = ["upcycle.cli.main", "train", str(recipe)]
    if launcher == "torchrun":
        where = ["--nproc-per-node", str(RANKS), "--master-port", port]
        return [*python, "-m", "torch.distributed.run", *where, "-m", *ours]
    if launcher == "deepspeed":
        where = ["--num_gpus", str(RANKS), "--master_port", port, "--no_local_rank"]
        return [*python, "-m", "deepspeed.launcher.runner", *where, "--module", *ours]
    return [*python, "-m", *ours, "--nproc", str(RANKS)]


def launched(launcher: str, recipe: TrainRecipe) -> None:
    path = Path(recipe.output).with_suffix(".yaml")
    path.write_text(recipe.dump())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command(launcher, path), env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", DIVISIONS)
def test_four_ranks_give_the_curve_of_one(launcher: str, pico_moe: Model, tmp_path: Path) -> None:
    alone = recipe_for(pico_moe("qwen2_moe"), tmp_path / "one", micro_batch=1, stage={"steps": 4})
    run(alone)
    four = two_ranks(alone, tmp_path / "four", **DIVISIONS[launcher])
    launched(launcher, four)
    assert losses(four) == pytest.approx(losses(alone), rel=1e-4)
    saved = latest(Path(four.output))
    assert saved is not None
    assert saved.state["world"] == RANKS


@pytest.mark.slow
def test_a_teacher_divided_among_four_ranks(pico_moe: Model, dense_maker: Callable[..., Path], tmp_path: Path) -> None:
    """With its distributions cached, too: ranks run it together, whichever of them lacks a row."""
    told = {"parent": str(dense_maker(tmp_path / "dense", "llama", num_hidden_layers=2)), "logits": 1.0}
    live = recipe_for(
        pico_moe("mixtral"), tmp_path / "one", micro_batch=1, stage={"distillation": {**told, "hidden": 0.5}}
    )
    run(live)
    four = two_ranks(live, tmp_path / "four", zero={"stage": 3})
    launched("upcycle", four)
    assert losses(four) == pytest.approx(losses(live), rel=1e-4)
    cached = recipe_for(
        pico_moe("mixtral"),
        tmp_path / "kept",
        micro_batch=1,
        stage={"distillation": {**told, "cache": str(tmp_path / "rows")}},
    )
    run(cached)
    kept = sorted((tmp_path / "rows").glob("*/*.safetensors"))
    for path in kept[::3]:
        path.unlink()
    again = two_ranks(cached, tmp_path / "again", zero={"stage": 3})
    launched("upcycle", again)
    assert losses(again) == pytest.approx(losses(cached), rel=1e-4)
    assert sorted((tmp_path / "rows").glob("*/*.safetensors")) == kept
