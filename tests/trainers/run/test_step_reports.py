"""Lines, the log, and trackers."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from upcycle.errors import EnvironmentFault
from upcycle.trainers.routing.bias_balance import Load
from upcycle.trainers.run import step_reports
from upcycle.trainers.run.step_reports import Reports, StepReport, read_log


def report(step: int = 3, **changes: Any) -> StepReport:
    content: dict[str, Any] = {
        "step": step,
        "steps": 10,
        "stage": "heal",
        "loss": 2.5,
        "parts": {"switch_balance": 0.0123, "kl": 0.5},
        "learning_rate": 1e-3,
        "gradient_norm": 0.75,
        "applied": True,
        "tokens": 384,
        "tokens_per_second": 1234.5,
        "utilisation": 0.42,
        "memory": 1_500_000_000,
        "loads": [Load(0, 1.2, 0), Load(1, 1.7, 2)],
        "dropped": 0.125,
    }
    return StepReport(**{**content, **changes})


def test_the_line_of_a_step_shows_all_its_numbers() -> None:
    assert report().line() == (
        "heal 3/10  loss 2.5000  switch_balance 0.0123  kl 0.5  lr 1.00e-03  norm 0.75  1,234 tok/s  42% of peak  "
        "1.50 GB  load 1.70x  dropped 12.5%  dead 2"
    )
    assert "SKIPPED" in report(applied=False, gradient_norm=math.inf).line()
    assert "load" not in report(loads=[]).line()


def test_the_log_has_every_layer_and_only_numbers_json_knows(tmp_path: Path) -> None:
    said: list[str] = []
    step_reports = Reports(tmp_path, [], said.append)
    step_reports.step(report(1), printed=True)
    step_reports.step(report(2, loss=math.nan, gradient_norm=math.inf), printed=False)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert len(said) == 1
    assert first["load_max_over_mean"] == [1.2, 1.7]
    assert first["dead_experts"] == [0, 2]
    assert first["loss/kl"] == 0.5
    assert (second["loss"], second["gradient_norm"]) == (None, None)


def test_a_log_is_cut_where_a_run_continues(tmp_path: Path) -> None:
    step_reports = Reports(tmp_path, [], print)
    for step in (1, 2, 3):
        step_reports.step(report(step), printed=False)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    Reports(tmp_path, [], print, first_step=2)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_the_numbers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.ModuleType(name)
    fake.init = lambda **settings: calls.append(settings)  # type: ignore[attr-defined]
    fake.log = lambda numbers, step: calls.append((numbers, step))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append("finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)
    step_reports = Reports(tmp_path, [name], print)
    step_reports.step(report(), printed=False)
    step_reports.close()
    assert calls[0] == {"project": tmp_path.name}
    numbers, step = calls[1]
    assert step == 3
    assert numbers["loss"] == 2.5
    assert all(isinstance(value, (int, float)) for value in numbers.values())
    assert calls[2] == "finished"


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(EnvironmentFault, match=f"{name} is not installed") as error:
        Reports(tmp_path, [name], print)
    assert error.value.hint
    assert f"pip install {name}" in error.value.hint


def test_a_tracker_that_does_not_start_or_fails_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Service:
        def __init__(self, folder: Path) -> None:
            if not (tmp_path / "logged in").exists():
                raise ValueError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

        def log(self, numbers: object, step: int) -> None:
            raise ConnectionError("the service has gone")

        def close(self) -> None:
            raise AssertionError("it was dropped")

    monkeypatch.setitem(step_reports._TRACKERS, "wandb", Service)
    said: list[str] = []
    with pytest.raises(EnvironmentFault, match=r"log.trackers: wandb did not start: api_key not configured") as error:
        Reports(tmp_path, ["wandb"], said.append)
    assert "wandb login, or WANDB_MODE=offline" in str(error.value.hint)
    (tmp_path / "logged in").touch()
    told = Reports(tmp_path, ["wandb"], said.append)
    told.record({"kind": "step", "step": 1, "loss": 2.0})
    told.record({"kind": "step", "step": 2, "loss": 1.0})
    told.close()
    assert said == ["warning: wandb failed and gets no further reports: the service has gone"]
    assert len(read_log(tmp_path / "log.jsonl")) == 2
