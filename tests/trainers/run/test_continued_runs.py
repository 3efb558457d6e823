"""Runs on one rank that a signal stops, and what the same command makes of them: it continues them, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_runs import losses, recipe_for, run, steps

from upcycle.errors import UsageError
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.checkpoints.write import finished
from upcycle.trainers.distributed import launcher
from upcycle.trainers.distributed.signals import STOPPING, Stopped
from upcycle.trainers.run import stage
from upcycle.trainers.run.step import Stepper

Model = Callable[[str], Path]


@pytest.fixture(autouse=True)
def hangups_count() -> Iterator[None]:
    """A run under ``nohup`` ignores SIGHUP, as it should; these tests send it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"zero": {"stage": 0}},
        {"zero": {"stage": 1}},
        pytest.param({"zero": {"stage": 3}}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"zero": {"stage": 2, "offload_optimizer": True}}, marks=pytest.mark.slow),
    ],
)
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(pico_moe: Model, tmp_path: Path, settings: Any) -> None:
    noisy = {"control": {"noise": "learned", "jitter": 0.01}}
    whole = recipe_for(pico_moe("mixtral"), tmp_path / "whole", stage=noisy, **settings)
    run(whole)
    parts = recipe_for(pico_moe("mixtral"), tmp_path / "parts", stage=noisy, **settings)
    parts = parts.model_copy(update={"data": whole.data})
    _stopped_at(parts, 4)
    result, said = run(parts)
    assert any("continuing" in line for line in said)
    assert steps(parts) == steps(whole)
    assert result.step == 6
    first, second = (latest(Path(recipe.output)) for recipe in (whole, parts))
    assert first
    assert second
    assert len(first.state["files"]) == 2
    assert first.state["files"] == second.state["files"]  # SHA-256 of all weights and optimizer states


def _stopped_at(recipe: Any, step: int, number: int = signal.SIGTERM) -> None:
    """Run, and send a signal while a step runs."""
    original = Stepper.step

    def stepping(self: Stepper, engine: Any, batches: Any, progress: float) -> Any:
        if round(progress * 6) == step - 1:
            os.kill(os.getpid(), number)
        return original(self, engine, batches, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", stepping)
        result, said = run(recipe)
    assert result.stopped
    assert result.step == step
    assert result.checkpoint.endswith(f"step-{step:08d}")
    name = signal.Signals(number).name
    assert said[-1] == f"stopped by {name}; step {step} is saved; to continue, run the same command again"


@pytest.mark.one_in(4)
@pytest.mark.parametrize("number", STOPPING)
def test_every_signal_that_stops_a_run_saves_its_step(pico_moe: Model, tmp_path: Path, number: int) -> None:
    before = [signal.getsignal(each) for each in STOPPING]
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, saving={"every": 100})
    _stopped_at(recipe, 2, number)
    assert [path.name for path in finished(tmp_path / "run")] == ["step-00000002"]
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_a_signal_before_the_first_step_ends_the_run_at_once(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1})

    def loading(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "load_model", loading)
        with pytest.raises(Stopped, match="SIGUSR1"):
            run(recipe)
    assert run(recipe)[0].step == 1


def test_the_command_says_130_and_how_to_continue(
    pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from upcycle.cli.main import main

    recipe = recipe_for(pico_moe("mixtral"), tmp_path)
    (tmp_path / "r.yaml").write_text(recipe.dump())
    original = Stepper.step

    def stepping(self: Stepper, engine: Any, batches: Any, progress: float) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return original(self, engine, batches, progress)

    monkeypatch.delenv(launcher.COMMAND, raising=False)  # as nothing but a launcher sets it
    words = ["train", str(tmp_path / "r.yaml"), "--restart", "--set", "clip=2"]
    monkeypatch.setattr("sys.argv", ["upcycle", *words])
    monkeypatch.setattr(Stepper, "step", stepping)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 130
    said = " ".join(capsys.readouterr().out.split())
    assert f"to continue upcycle train {tmp_path / 'r.yaml'} --set clip=2" in said


@pytest.mark.slow
def test_a_checkpoint_continues_under_another_zero_stage(pico_moe: Model, tmp_path: Path) -> None:
    whole = recipe_for(pico_moe("mixtral"), tmp_path / "whole")
    run(whole)
    parts = recipe_for(pico_moe("mixtral"), tmp_path / "parts").model_copy(update={"data": whole.data})
    _stopped_at(parts, 3)
    other = parts.model_copy(update={"zero": parts.zero.model_copy(update={"stage": 3}), "micro_batch": 4})
    run(other)
    assert losses(other) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.long
def test_a_run_that_stopped_between_stages_goes_on_with_the_next(pico_moe: Model, tmp_path: Path) -> None:
    stages = [
        {"name": "one", "train": ["router"], "steps": 2, "learning_rate": 0.1},
        {"name": "two", "steps": 2, "learning_rate": 0.01},
    ]
    whole = recipe_for(pico_moe("mixtral"), tmp_path / "whole", stages=stages)
    run(whole)
    parts = recipe_for(pico_moe("mixtral"), tmp_path / "parts", stages=stages).model_copy(update={"data": whole.data})
    original = Stepper.step

    def stepping(self: Stepper, engine: Any, batches: Any, progress: float) -> Any:
        if self.stage.name == "one" and progress == 0.5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, engine, batches, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", stepping)
        assert run(parts)[0].step == 2
    run(parts)
    assert steps(parts) == steps(whole)


def test_a_checkpoint_of_another_run_is_refused(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 2})
    run(recipe)
    other = recipe.model_copy(update={"seed": 5})
    with pytest.raises(UsageError, match="another run: seed was 0 and is now 5") as error:
        run(other)
    assert "--restart" in str(error.value.hint)
    with pytest.raises(UsageError, match="another run: model was"):
        run(recipe.model_copy(update={"model": str(pico_moe("qwen3_moe"))}))
    assert run(other, restart=True)[0].step == 2


@pytest.mark.long
def test_the_log_of_a_killed_run_is_cut_where_it_continues(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path)
    _stopped_at(recipe, 4)
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"kind": "step", "step": 5, "loss": 0}) + '\n{"kind": "st')
    run(recipe)
    assert [line["step"] for line in steps(recipe)] == [1, 2, 3, 4, 5, 6]
    assert steps(recipe)[4]["loss"] > 0
