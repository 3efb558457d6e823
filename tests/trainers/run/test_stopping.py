"""Every way to start a run against every signal that stops one: the step is saved, the exit code told, the run continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import losses, recipe_for, run

from upcycle.trainers.checkpoints.write import finished
from upcycle.trainers.recipe.training_recipe import TrainRecipe

pytestmark = pytest.mark.slow
Model = Callable[[str], Path]
MODULE = "upcycle.cli.main"
# torchrun ends with a code of its own, and knows SIGUSR1 where it is told.
WAYS = {
    "alone": [sys.executable, "-P", "-m", MODULE, "train", "RECIPE"],
    "nproc": [sys.executable, "-P", "-m", MODULE, "train", "RECIPE", "--nproc", "2"],
    "hostfile": [sys.executable, "-P", "-m", MODULE, "train", "RECIPE", "--hostfile", "HOSTS"],
    "torchrun": [
        *(sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", MODULE, "train", "RECIPE"),
    ],
}


def start(way: str, recipe: TrainRecipe) -> subprocess.Popen[str]:
    folder = Path(recipe.output).parent
    (folder / "r.yaml").write_text(recipe.dump())
    (folder / "hosts").write_text("localhost slots=2\n")
    names = {"RECIPE": str(folder / "r.yaml"), "HOSTS": str(folder / "hosts")}
    return subprocess.Popen(
        [names.get(word, word) for word in WAYS[way]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def signal_after(process: subprocess.Popen[str], recipe: TrainRecipe, step: int, number: int) -> None:
    log = Path(recipe.output) / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count('"kind": "step"') < step):
        time.sleep(0.02)
    process.send_signal(number)


def nobody_trains(recipe: TrainRecipe) -> bool:
    name = str(Path(recipe.output).parent / "r.yaml").encode()
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return not any(name in line for line in lines)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("way", WAYS)
def test_a_signal_saves_and_the_run_continues(pico_moe: Model, tmp_path: Path, way: str, name: str) -> None:
    whole = recipe_for(pico_moe("mixtral"), tmp_path / "whole", micro_batch=1, stage={"steps": 40, "schedule": {}})
    parts = whole.model_copy(
        update={
            "output": str(tmp_path / "parts" / "run"),
            "saving": whole.saving.model_copy(update={"every": 100}),
        }
    )
    (tmp_path / "parts").mkdir()
    process = start(way, parts)
    signal_after(process, parts, 3, signal.Signals[name])
    said, _ = process.communicate(timeout=240)
    if way != "torchrun":
        assert process.returncode == 130, said[-3000:]
        assert f"stopped by {name}" in said
        options = " ".join(WAYS[way][6:]).replace("HOSTS", str(tmp_path / "parts" / "hosts"))
        again = f"to continue upcycle train {tmp_path / 'parts' / 'r.yaml'} {options}"
        assert "".join(again.split()) in "".join(said.split()), "whatever the width that long lines are folded to"
    end = time.monotonic() + 60
    while not nobody_trains(parts) and time.monotonic() < end:
        time.sleep(0.2)
    assert nobody_trains(parts)
    (saved,) = finished(Path(parts.output))
    step = json.loads((saved / "trainer.json").read_text())["step"]
    assert 3 <= step < 40
    run(parts)  # alone: on as many ranks as that
    assert len(losses(parts)) == 40


@pytest.mark.parametrize("way", ["nproc", "hostfile", "torchrun"])
def test_ranks_whose_starter_is_killed_save_and_end(pico_moe: Model, tmp_path: Path, way: str) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, micro_batch=1, stage={"steps": 2000}, saving={"every": 5000})
    process = start(way, recipe)
    signal_after(process, recipe, 2, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 60
    while not nobody_trains(recipe) and time.monotonic() < end:
        time.sleep(0.2)
    assert nobody_trains(recipe)
    assert finished(Path(recipe.output))
