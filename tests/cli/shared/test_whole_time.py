"""What is left of work in phases: by the forecast, corrected by how the work so far compared with it."""

from __future__ import annotations

import io

import pytest

from upcycle.cli.shared import output
from upcycle.cli.shared.output import ProgressBars, working
from upcycle.cli.shared.whole_time import WholeTime

PHASES = {"opening": 2.0, "calibrating": 100.0, "verifying": 50.0}


def test_what_is_left_is_the_forecast_at_the_pace_so_far() -> None:
    whole = WholeTime(PHASES)
    assert whole.left("calibrating", 0.0, 0.0) == 150
    assert whole.left("calibrating", 0.5, 100.0) == pytest.approx(200)  # twice as slow: 50 and 50 are left, twice
    whole.finish("calibrating", 200.0)
    assert whole.left("verifying", 0.5, 50.0) == pytest.approx(25 * 250 / 125)
    whole.finish("verifying", 100.0)
    assert whole.left("verifying", 1.0, 1.0) is None


def test_it_is_steady_where_later_phases_have_other_steps() -> None:
    """Work that takes as long as was forecast: at every step, the estimate is what is really left."""
    whole, passed = WholeTime(PHASES), 0.0
    for title, seconds in list(PHASES.items())[1:]:
        for step in range(4):
            left = whole.left(title, step / 4, seconds * step / 4)
            assert left == pytest.approx(150 - passed - seconds * step / 4)
        whole.finish(title, seconds)
        passed += seconds


def test_steps_that_a_run_before_did_say_nothing_of_the_pace() -> None:
    whole = WholeTime(PHASES)
    assert whole.left("calibrating", 0.5, 0.1) == 100
    assert whole.left("calibrating", 0.75, 50.1) == pytest.approx(2 * 75)  # a quarter took 50 and not 25
    whole.finish("calibrating", 100.1)
    assert whole.left("verifying", 0.0, 0.0) == pytest.approx(2 * 50)


def test_phases_without_a_forecast_say_nothing_of_the_whole() -> None:
    assert WholeTime({}).left("calibrating", 0.5, 1.0) is None
    whole = WholeTime(PHASES)
    whole.finish("merging", 9.0)
    assert whole.left("calibrating", 0.0, 0.0) == 150


def test_a_log_has_what_is_left_of_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(output, "monotonic", lambda: now[0])
    bars = ProgressBars(quiet=False)
    assert bars.listens
    assert not ProgressBars(quiet=True).listens
    bars.expect(PHASES)
    with bars.phase("calibrating", 10):
        now[0] = 50.0
        bars.advance(5)
    assert "calibrating: 5 of 10, about 50.0 s left, of all 1 min 40 s" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_a_spinner_turns_on_a_terminal_alone(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TERM", "xterm"), ("CI", ""), ("TQDM_DISABLE", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", stream)
    with working("loading [red]it"):
        pass
    assert ("loading [red]it" in stream.getvalue()) == stream.isatty()


@pytest.mark.parametrize("phases", [{}, PHASES], ids=["unknown", "forecast"])
def test_bars_have_a_spinner_and_what_is_left_of_all(phases: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TERM", "xterm"), ("CI", ""), ("TQDM_DISABLE", ""), ("COLUMNS", "60")):
        monkeypatch.setenv(name, value)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    now = [0.0]
    monkeypatch.setattr(output, "monotonic", lambda: now[0])
    bars = ProgressBars(quiet=False)
    bars.expect(phases)
    with bars.phase("calibrating", 10):
        now[0] = 50.0
        bars.advance(5)
        bars._bars.refresh()  # it does so itself ten times a second
    drawn = stream.getvalue()
    assert "calibrating" in drawn
    assert any(frame in drawn for frame in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
    assert ("1 min 40 s of all" in drawn) == bool(phases)
