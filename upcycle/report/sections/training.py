"""Shows training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.report.drawing.frame import Plot
from upcycle.report.drawing.lines import Series, lines

# (curve, title, label of the vertical axis, whether the axis must include 0)
_PLOTS = (
    ("max_violation", "Does the worst layer's balance hold?", "MaxVio (max / mean - 1)", True),
    ("dead_experts", "Do experts die?", "experts without a token, all layers", True),
    ("dropped", "Are tokens dropped?", "share of choices over capacity", True),
    ("learning_rate", "How does the learning rate change?", "learning rate", True),
    ("gradient_norm", "Are the gradients stable?", "norm of the gradient", True),
    ("tokens_per_second", "How fast does it train?", "tokens per second", True),
)


def training_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return plots of the curves in the log, the run's length, and its last alarms."""
    curves = data["curves"]
    plots = [_plot([("loss", curves["loss"])], "Does the loss fall?", "loss in nats per token", False)]
    if data["validation"]:
        found = list(data["validation"].items())
        plots.append(
            _plot(
                found, "Does the loss fall on text that is not trained on?", "validation loss in nats per token", False
            )
        )
    parts = [(name.partition("/")[2], curve) for name, curve in curves.items() if name.startswith("loss/")]
    if parts:
        plots.append(_plot(parts[:6], "What do the auxiliary losses add?", "loss before its coefficient", True))
    plots += [_plot([(key, curves[key])], title, label, zero) for key, title, label, zero in _PLOTS if key in curves]
    return {
        "steps": data["steps"],
        "tokens": data["tokens"],
        "stages": ", ".join(data["stages"]),
        "alarms": data["alarms"][-20:],
        "more_alarms": max(0, len(data["alarms"]) - 20),
        "plots": plots,
    }


def _plot(named: Sequence[tuple[str, Mapping[str, list[float]]]], title: str, label: str, zero: bool) -> Plot:
    ends = [f"{name} {curve['values'][0]:.4g} to {curve['values'][-1]:.4g}" for name, curve in named if curve["values"]]
    return lines(
        [Series(name, curve["steps"], curve["values"]) for name, curve in named],
        title=title,
        reading=f"From first to last: {'; '.join(ends)}.",
        x="step",
        y=label,
        include=(0.0,) if zero else (),
        whole=True,
    )
