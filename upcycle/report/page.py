"""Draws a report as one HTML page: each section is a template, filled with what its view makes of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from upcycle.report.sections.comparison import comparison_view
from upcycle.report.sections.cost import cost_view
from upcycle.report.sections.exactness import exactness_view
from upcycle.report.sections.experts import experts_view
from upcycle.report.sections.made import made_view
from upcycle.report.sections.quality import quality_view
from upcycle.report.sections.routing import routing_view
from upcycle.report.sections.speed import speed_view
from upcycle.report.sections.summary import summary_view
from upcycle.report.sections.tasks import tasks_view
from upcycle.report.sections.training import training_view

_TEMPLATES = Path(__file__).parent / "templates"
_View = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# Section name -> heading and view, in the order of the page.
_SECTIONS: dict[str, tuple[str, _View]] = {
    "quality": ("Quality", quality_view),
    "tasks": ("Tasks", tasks_view),
    "exactness": ("Exactness", exactness_view),
    "routing": ("Routing", routing_view),
    "experts": ("Experts", experts_view),
    "cost": ("Cost", cost_view),
    "speed": ("Speed", speed_view),
    "made": ("What was done", made_view),
    "training": ("Training", training_view),
    "comparison": ("Other ways to make it", comparison_view),
    "provenance": ("Provenance", dict),
}


def draw_page(data: Mapping[str, Any]) -> str:
    """Return the HTML of a report's data (:func:`upcycle.report.data.collect.collect`); the page loads nothing from outside."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [(name, title, data[name], _view(view, data[name])) for name, (title, view) in _SECTIONS.items()]
    return environment.get_template("page.html").render(
        out=data["out"],
        version=data["upcycle"],
        summary=summary_view(data),
        sections=sections,
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
    )


def _view(view: _View, data: Mapping[str, Any]) -> Mapping[str, Any]:
    return {} if "missing" in data else view(data)
