"""What a notebook shows: results as tables, a bar for each phase, nothing elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tqdm.auto

import upcycle
from upcycle import notebook
from upcycle.notebook import HtmlShown, NotebookProgress


class Result(HtmlShown):
    def as_dict(self) -> dict[str, Any]:
        rows = [{"name": f"<b>{number}</b>", "loss": number / 3, "empty": None} for number in range(40)]
        return {
            "out": "<script>",
            "ok": True,
            "none": None,
            "size": 12345,
            "rows": rows,
            "inner": {"many": list(range(20))},
        }


def test_results_are_tables_and_nothing_in_them_is_markup() -> None:
    page = Result()._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;3&lt;/b&gt;" in page
    assert "12,345" in page
    assert "0.3333" in page
    assert "none" not in page
    assert "empty" not in page
    assert "rows: 40" in page
    assert "and 10 more" in page
    assert "0, 1, 2, 3, 4, 5, 6, 7, ... (20)" in page
    assert page.count("<tr>") == 1 + 30 + 3 + 1  # header and rows, out, ok and size, many


def test_plans_and_conversions_are_shown() -> None:
    plan = upcycle.plan("demo", experts=4, top_k=2)
    page = plan._repr_html_()
    assert "<h4>Plan</h4>" in page
    assert f"{plan.parameters_total:,}" in page
    assert "sparse_upcycling" in page
    assert "each token runs 2 copies" in page


class Bar:
    """Stands in for tqdm's."""

    made: list[Bar] = []

    def __init__(self, total: int, desc: str, leave: bool) -> None:
        self.total, self.desc, self.done, self.closed = total, desc, 0, False
        self.made.append(self)

    def update(self, steps: int) -> None:
        self.done += steps

    def close(self) -> None:
        self.closed = True


def work(progress: NotebookProgress) -> None:
    with progress.phase("outer", 2):
        progress.advance()
        with progress.phase("inner", 3):
            progress.advance(3)
        progress.advance()
    progress.note("beware")


def test_a_notebook_has_a_bar_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    Bar.made = []
    Bar.write = staticmethod(written.append)  # type: ignore[attr-defined]
    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    work(NotebookProgress())
    assert [(bar.desc, bar.done, bar.total, bar.closed) for bar in Bar.made] == [
        ("outer", 2, 2, True),
        ("inner", 3, 3, True),
    ]
    assert written == ["warning: beware"]


def test_elsewhere_functions_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert not notebook.in_notebook()
    work(NotebookProgress())
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.long
def test_a_report_is_shown_as_its_page(tmp_path: Path) -> None:
    upcycle.convert("demo", tmp_path / "moe", experts=4, top_k=2, verification={"tokens": 64})
    shown = upcycle.write_report(tmp_path / "moe")._repr_html_()
    assert re.match(r"<iframe srcdoc='[^']*' sandbox style='[^']*'></iframe>$", shown)
    assert "&lt;html" in shown
