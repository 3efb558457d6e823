"""Models side by side: a model has one colour in every plot."""

from __future__ import annotations

import re
from typing import Any

from upcycle.report.sections.models import _flops, _plot


def model(name: str, flops: float) -> dict[str, Any]:
    domains = [{"text": "prose", "perplexity": 20.0 + flops}]
    return {"out": name, "quality": {"domains": domains}, "cost": {"after": {"flops_per_token": flops}}}


def time_of(one: dict[str, Any], _: dict[str, Any]) -> float | None:
    return None if one["out"] == "dense" else 1.0 + float(one["cost"]["after"]["flops_per_token"])


def test_a_model_that_was_not_timed_leaves_its_colour_to_nobody() -> None:
    models = [model("dense", 2.0), model("half", 1.0), model("third", 0.7)]
    words = ("Which?", "cost")
    by_flops = _plot(models, ["prose"], _flops, words)
    by_time = _plot(models, ["prose"], time_of, words)
    assert by_flops is not None
    assert by_time is not None
    colours = [
        dict(re.findall(r'dots lone s(\d)".*?</svg>(\w+)</span>', str(plot.legend))) for plot in (by_flops, by_time)
    ]
    assert colours == [{"0": "dense", "1": "half", "2": "third"}, {"1": "half", "2": "third"}]
    assert 's0"' not in str(by_time.area)
    assert [one["name"] for one in by_time.values["series"]] == ["half", "third"]
