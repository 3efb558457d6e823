"""Draws a report as one HTML page: each section is a template, filled with what its view makes of the data."""

from __future__ import annotations

import base64
import hashlib
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
from upcycle.report.sections.models import models_view
from upcycle.report.sections.quality import quality_view
from upcycle.report.sections.routing import routing_view
from upcycle.report.sections.speed import speed_view
from upcycle.report.sections.summary import summary_view
from upcycle.report.sections.tasks import tasks_view
from upcycle.report.sections.terms import explained, typed
from upcycle.report.sections.training import training_view
from upcycle.version import __version__

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
    """Return the HTML of a report's data (:func:`upcycle.report.collect.collect`); the page loads nothing from outside."""
    sections = [(name, title, data[name], _view(view, data[name])) for name, (title, view) in _SECTIONS.items()]
    return _drawn("page.html", data["out"], summary=summary_view(data), sections=sections)


def draw_models(data: Mapping[str, Any]) -> str:
    """Return the HTML of several models side by side (:func:`upcycle.report.write_report.write_side_by_side`)."""
    names = ", ".join(model["out"] for model in data["models"])
    return _drawn("models.html", names, view=models_view(data["models"], data["vocabularies"]))


def _drawn(template: str, out: str, **content: Any) -> str:
    """Fill a template, and the one around it: style, script, and a policy that lets no other script run."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["explained"] = explained
    environment.filters["typed"] = typed
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(f"\n{script}\n".encode()).digest()
    return environment.get_template(template).render(
        out=out,
        version=__version__,
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode("ascii"),
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        **content,
    )


def _view(view: _View, data: Mapping[str, Any]) -> Mapping[str, Any]:
    return {} if "missing" in data else view(data)
