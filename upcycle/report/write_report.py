"""Writes a report: an HTML file that needs no other file, and a JSON file with its data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.output.ownership import cannot_write, check_overwritable, holds_keys
from upcycle.files.user_paths import user_path
from upcycle.notebook import IN_NOTEBOOKS
from upcycle.progress import Progress
from upcycle.report.collect import Wanted, collect
from upcycle.report.data.subject import find_subject

_GENERATOR = '<meta name="generator" content="upcycle report">'
INSTALL_REPORT = "pip install 'upcycle[report]'"


@dataclass(frozen=True)
class Report:
    """Holds the paths of a report's two files, and its data."""

    html: Path
    json: Path
    data: dict[str, Any]

    def _repr_html_(self) -> str:
        page = escape(self.html.read_text(encoding="utf-8"))
        return f"<iframe srcdoc='{page}' sandbox style='width:100%;height:48em;border:0'></iframe>"


def can_draw() -> bool:
    """Return whether the extra ``report`` is installed."""
    return find_spec("jinja2") is not None


def write_report(
    name: str | Path, out: str | Path | None = None, wanted: Wanted | None = None, progress: Progress = IN_NOTEBOOKS
) -> Report:
    """Write a report on a conversion's OUT, a training run, or another model.

    Args:
        name: folder or hub id.
        out: the HTML file; default: ``report.html`` in the folder, or for a hub id in the current folder. The JSON file is
            written beside it.
        wanted: what to measure.
        progress: receives the progress.

    Raises:
        EnvironmentFault: the extra ``report`` is not installed, or a file cannot be written.
        UpcycleError: there is nothing to report on.
    """
    if not can_draw():
        raise EnvironmentFault("a report needs jinja2, which is not installed", hint=INSTALL_REPORT)
    from upcycle.report.page import draw_page

    html = user_path(out) if out else None
    if html and (html.suffix not in (".html", ".htm") or not html.absolute().parent.is_dir()):
        raise UsageError(f"cannot write a report to {html}", hint="--out names an .html file in a folder that exists")
    if html is not None:
        check_report(html)
    subject, data = collect(str(name), wanted or Wanted(), progress)
    if html is None:
        local = user_path(name).absolute().parent == subject.folder.absolute().parent
        html = (subject.folder if local or user_path(name).is_dir() else Path()) / "report.html"
        check_report(html)
    with progress.phase("drawing", 1):
        page = draw_page(data)
        progress.advance()
    found = html.with_suffix(".json")
    _write(found, json.dumps(data, indent=1, allow_nan=False) + "\n")
    _write(html, page)
    return Report(html, found, data)


MOST_MODELS = 6  # which colours and dashes can tell apart


def write_side_by_side(
    names: Sequence[str], out: str | Path, wanted: Wanted | None = None, progress: Progress = IN_NOTEBOOKS
) -> Report:
    """Write one page about several models: quality against time and FLOPs, and what is said of each.

    Args:
        names: two to six folders or hub ids.
        out: the HTML file; the JSON file, with the data of every model's report, is written beside it.
        wanted: what to measure, of each.
        progress: receives the progress.

    Raises:
        UsageError: there are fewer models or more, or one is named twice.
        EnvironmentFault: the extra ``report`` is not installed, or a file cannot be written.
        UpcycleError: there is nothing to report on.
    """
    if not 2 <= len(names) <= MOST_MODELS or len(set(names)) < len(names):
        raise UsageError(
            f"{len(names)} models side by side: {', '.join(names)}", hint=f"name two to {MOST_MODELS}, each once"
        )
    if not can_draw():
        raise EnvironmentFault("a report needs jinja2, which is not installed", hint=INSTALL_REPORT)
    from upcycle.report.page import draw_models

    html = user_path(out)
    if html.suffix not in (".html", ".htm") or not html.absolute().parent.is_dir():
        raise UsageError(f"cannot write a report to {html}", hint="--out names an .html file in a folder that exists")
    check_report(html)
    subjects = [find_subject(name) for name in names]
    calibrations = [each.record["calibration"] for each in subjects if each.record and each.record.get("calibration")]
    alike = replace(wanted or Wanted(), calibrations=calibrations)
    data = {
        "models": [collect(name, alike, progress)[1] for name in names],
        "vocabularies": sorted({each.text_config.get("vocab_size", 0) for each in subjects}),
    }
    page, found = draw_models(data), html.with_suffix(".json")
    _write(found, json.dumps(data, indent=1, allow_nan=False) + "\n")
    _write(html, page)
    return Report(html, found, data)


def check_report(html: Path) -> None:
    """Refuse to overwrite a page, or the JSON file beside it, that is not a report.

    Raises:
        UsageError: there is such a file.
    """
    check_overwritable(html, lambda text: _GENERATOR in text[:4096])
    one, several = holds_keys("out", "upcycle", "summary", "provenance"), holds_keys("models", "vocabularies")
    check_overwritable(html.with_suffix(".json"), lambda text: one(text) or several(text))


def _write(path: Path, text: str) -> None:
    """Write a file as a whole."""
    try:
        write_text_whole(path, text)
    except OSError as error:
        raise cannot_write(path, error) from None
