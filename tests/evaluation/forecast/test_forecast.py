"""Forecasts: phases as a conversion has them, times that follow the work, and a reason where nothing is known."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from click.testing import CliRunner

from upcycle.cli.main import cli
from upcycle.conversion.jobs import job_of
from upcycle.evaluation.forecast import forecast as module
from upcycle.evaluation.forecast import probes
from upcycle.evaluation.forecast.forecast import Forecast, forecast, forecast_in_words, forecast_of
from upcycle.evaluation.forecast.probes import ByteTimes, LayerTimes, layer_times, seconds
from upcycle.planning.expert_job import ExpertJob
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe
from upcycle.registry import METHODS

SPLIT: dict[str, Any] = {
    "method": "contiguous_split",
    "experts": 4,
    "top_k": 2,
    "router": "ridge",
    "calibration": {"text": "demo", "tokens": 4096},
}


def recipe(**keys: Any) -> Recipe:
    return parse_recipe({"source": "demo", **keys}, "it")


def job(**keys: Any) -> ExpertJob:
    found = job_of(recipe(**keys))
    assert isinstance(found, ExpertJob)
    return found


def test_what_cannot_be_planned_or_is_short_is_not_forecast(still: None) -> None:
    assert forecast_of(recipe(target="no_such_target"), 0.0) is None
    assert forecast_of(recipe(**SPLIT), least=1e15) is None
    assert forecast_of(recipe(**SPLIT), least=1e9) is not None


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every measurement is known."""
    monkeypatch.setattr(module, "layer_times", lambda job: LayerTimes(1e-4, 1e-3, 2.0))
    monkeypatch.setattr(module, "product_seconds", lambda *sizes: 1e-12)
    monkeypatch.setattr(module, "byte_times", lambda: ByteTimes(1e-9, 0.0, 0.0))
    monkeypatch.setattr(module, "comparison_seconds", lambda vocab: 0.0)


def test_a_calibration_costs_its_tokens_and_its_layers(still: None) -> None:
    few, many = (forecast(job(**SPLIT | {"calibration": {"text": "demo", "tokens": n}})) for n in (2048, 4096))
    layers = len(job(**SPLIT).shape.moe_layers)
    fixed = 2 * few.phases["calibrating"] - many.phases["calibrating"]
    assert fixed == pytest.approx(2.0 * layers, rel=1e-6)
    assert many.phases["calibrating"] - few.phases["calibrating"] == pytest.approx(2048 * layers * 1.1e-3, rel=0.2)
    assert list(many.phases) == ["opening", "calibrating", "converting", "verifying"]
    assert many.seconds == pytest.approx(sum(many.phases.values()))


def test_copies_are_not_calibrated(still: None) -> None:
    found = forecast(job(experts=4, top_k=2, verification={"enabled": False}))
    assert list(found.phases) == ["opening", "converting"]
    assert found.phases["converting"] == pytest.approx(job(experts=4, top_k=2).cost().bytes_output * 1e-9)


def test_what_is_not_known_says_why() -> None:
    found = forecast(job_of(recipe(method="static_prune", active=0.5, calibration="demo")))
    assert found == Forecast({}, "only copies and splits are")
    written = SPLIT | {"calibration": {"text": ["self", "demo"], "tokens": 4096}}
    assert "writes itself" in str(forecast(job(**written)).unknown)
    odd = job(**SPLIT)
    wide = replace(odd, dense=replace(odd.dense, intermediate_size=14335))
    assert "too wide" in str(forecast(wide).unknown)


def test_a_wide_layer_is_timed_by_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times as many neurons: the same part is timed, and scaled by its matrix products and by the cube of its width."""
    ticks = count()
    monkeypatch.setattr(
        probes, "seconds", lambda work, repeats=3: float(next(ticks) % 3 + 1)
    )  # a pass, few and many tokens
    narrow = job(**SPLIT)
    dense = narrow.dense
    monkeypatch.setattr(probes, "_WIDEST", dense.intermediate_size)
    wide = replace(
        narrow,
        dense=replace(dense, hidden_size=8 * dense.hidden_size, intermediate_size=8 * dense.intermediate_size),
        shape=replace(narrow.shape, expert_size=8 * narrow.shape.expert_size),
    )
    one, other = layer_times(narrow), layer_times(wide)
    assert other.ffn == pytest.approx(64 * one.ffn)
    assert other.token == pytest.approx(64 * one.token)
    assert other.fixed == pytest.approx(512 * one.fixed)


def test_the_real_probe_decides_a_layer() -> None:
    times = layer_times(job(**SPLIT))
    assert 0 < times.ffn < 1e-2
    assert 0 < times.token < 1e-1
    assert seconds(lambda: None) >= 0


SPLITTERS = [name for name, place in METHODS.items() if place.startswith("upcycle.splitters.")]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("method", SPLITTERS)
def test_every_method_can_be_timed_or_says_why_not(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_FEW", 64)
    monkeypatch.setattr(probes, "_MANY", 128)
    found = forecast(job(**SPLIT | {"method": method}))
    assert found.unknown or found.phases["calibrating"] > 0


@pytest.mark.one_in(10)
@pytest.mark.parametrize("router", ["ridge", "distilled", "centroid", "representative", "cool"])
@pytest.mark.parametrize("refit", ["down", "blocks", "scale", "none"])
def test_every_router_and_refit_can_be_timed(router: str, refit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_FEW", 64)
    monkeypatch.setattr(probes, "_MANY", 128)
    assert forecast(job(**SPLIT | {"router": router, "refit": refit})).phases["calibrating"] > 0


def test_plan_says_it(still: None) -> None:
    arguments = ["plan", "demo", "--method", "contiguous_split", "--experts", "4", "--top-k", "2"]
    printed = " ".join(CliRunner().invoke(cli, arguments).stdout.split())
    assert "to convert about " in printed
    assert "on this machine" in printed
    assert "on this machine" not in CliRunner().invoke(cli, [*arguments, "--no-time"]).stdout
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--json", "--time"]).stdout)["forecast"]
    assert told["seconds"] == pytest.approx(sum(told["phases"].values()))
    assert "forecast" not in json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert forecast_in_words(Forecast({"opening": 1.0, "converting": 2.0})) == "3.0 s (opening 1.0 s, converting 2.0 s)"
