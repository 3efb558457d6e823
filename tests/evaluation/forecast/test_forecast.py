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
from upcycle.evaluation.forecast.forecast import Forecast, forecast, said
from upcycle.evaluation.forecast.probes import LayerTimes, layer_times, seconds
from upcycle.planning.expert_job import ExpertJob
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe

SPLIT = {
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


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every measurement is known."""
    monkeypatch.setattr(module, "layer_times", lambda job: LayerTimes(1e-4, 1e-3, 2.0))
    monkeypatch.setattr(module, "product_seconds", lambda *sizes: 1e-12)
    monkeypatch.setattr(module, "file_seconds", lambda: (1e-9, 0.0))
    monkeypatch.setattr(module, "comparison_seconds", lambda vocab: 0.0)


def test_a_calibration_costs_its_tokens_and_its_layers(still: None) -> None:
    few, many = (forecast(recipe(**SPLIT | {"calibration": {"text": "demo", "tokens": n}})) for n in (2048, 4096))
    layers = len(job(**SPLIT).shape.moe_layers)
    fixed = 2 * few.phases["calibrating"] - many.phases["calibrating"]
    assert fixed == pytest.approx(2.0 * layers, rel=1e-6)
    assert many.phases["calibrating"] - few.phases["calibrating"] == pytest.approx(2048 * layers * 1.1e-3, rel=0.2)
    assert list(many.phases) == ["opening", "calibrating", "converting", "verifying"]
    assert many.seconds == pytest.approx(sum(many.phases.values()))


def test_copies_are_not_calibrated(still: None) -> None:
    found = forecast(recipe(experts=4, top_k=2, verification={"enabled": False}))
    assert list(found.phases) == ["opening", "converting"]
    assert found.phases["converting"] == pytest.approx(job(experts=4, top_k=2).cost().bytes_output * 1e-9)


def test_what_is_not_known_says_why() -> None:
    found = forecast(recipe(method="static_prune", active=0.5, calibration="demo"))
    assert found == Forecast({}, "only conversions of one model into experts are forecast")


def test_a_wide_layer_is_timed_by_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times as many neurons: the same part is timed, and scaled by its matrix products and by the cube of its width."""
    from upcycle.evaluation.forecast import probes

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


def test_plan_says_it(still: None) -> None:
    arguments = ["plan", "demo", "--method", "contiguous_split", "--experts", "4", "--top-k", "2"]
    printed = " ".join(CliRunner().invoke(cli, arguments).stdout.split())
    assert "to convert about " in printed
    assert "on this machine" in printed
    assert "on this machine" not in CliRunner().invoke(cli, [*arguments, "--no-time"]).stdout
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--json", "--time"]).stdout)["forecast"]
    assert told["seconds"] == pytest.approx(sum(told["phases"].values()))
    assert "forecast" not in json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert said(Forecast({"opening": 1.0, "converting": 2.0})) == "3.0 s (opening 1.0 s, converting 2.0 s)"
