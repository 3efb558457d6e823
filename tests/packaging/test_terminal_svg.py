"""The recorded terminal of the documentation is an SVG that shows what was printed, step by step."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

pytest.importorskip("pyte")

from terminal_svg import COMMAND, LAST, READ, Film

SVG = "{http://www.w3.org/2000/svg}"


def test_frames_show_what_was_printed_in_time_and_colour() -> None:
    film = Film(4, 24)
    film.typed("upcycle")
    work = [
        (0.0, b"1/5 the model: "),
        (0.1, b"demo\r\nstep 1"),
        (300.0, b"\rstep 2"),
        (600.0, b"\r\x1b[31mfailed\x1b[0m \x1b[38;5;214m<&>\x1b[0m\r\n"),
    ]
    film.printed(work)
    root = ElementTree.fromstring(film.svg("a <title>"))
    rows = {str(row.get("id")): "".join(row.itertext()) for row in root.iter(f"{SVG}g") if row.get("id")}
    shown = [rows[str(use.get("href")).removeprefix("#")] for use in root.iter(f"{SVG}use")]
    order = [
        shown.index(text)
        for text in ("$", "$upcycle", "1/5 the model:", "step 1", "step 2", "failed<&>")
        if text in shown
    ]
    assert len(order) == 5 + ("$" in shown)
    assert order == sorted(order)
    assert [text.get("class") for text in root.iter(f"{SVG}text") if text.text == "failed"] == ["red"]
    assert [text.get("style") for text in root.iter(f"{SVG}text") if text.text == "<&>"] == ["fill:#ffaf00"]
    assert sum(film.seconds) < 2 * COMMAND + READ + LAST  # of ten minutes
    assert root.find(f"{SVG}title") is not None
