"""The page in headless Chromium, at a phone's and a desktop's width, in light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_browser import CHROMIUM, Browser

from upcycle.report.write_report import Report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]
# What only a browser knows, with every <details> open: sizes of plots and images, what sticks out, colours, the title.
LOOK = """(async () => {
  document.querySelectorAll("details").forEach(part => part.open = true);
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode()));
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const box = part => part.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const scrolls = part => part.closest(".scroll");
  return {
    width: width,
    page: document.documentElement.scrollWidth,
    outside: [...document.body.querySelectorAll("*")].filter(part => !scrolls(part) && box(part).right > width + 1)
      .map(part => part.tagName + "." + (part.getAttribute("class") || "") + " " + part.textContent.slice(0, 40)),
    plots: [...document.querySelectorAll("figure.plot .area")].map(part =>
        [box(part).width, box(part).height, !!part.closest("[hidden]")]),
    marks: [...document.querySelectorAll(".area svg path.line")].map(part => part.getTotalLength()),
    ink: [...document.querySelectorAll(".area svg path.line")].map(part => getComputedStyle(part).stroke),
    bars: [...document.querySelectorAll(".bars .track i")].map(part => box(part).width),
    images: images.map(image => image.naturalWidth * image.naturalHeight),
    paper: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
    sizes: [...document.querySelectorAll(".frame span, .frame div.xlabel")].map(part => parseFloat(getComputedStyle(part).fontSize)),
  };
})()"""


# What the page's script does, as a reader would ask for it.
USE = """(async () => {
  document.querySelectorAll("details").forEach(part => part.open = true);
  const figures = [...document.querySelectorAll("figure.plot")].filter(part => part.reportParts);
  const tip = document.querySelector(".tip");
  const point = (figure, x, y) => {
    const area = figure.querySelector(".area"), box = area.getBoundingClientRect();
    area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
    return tip.style.display === "none" ? "" : tip.innerText;
  };
  const grid = figures.find(part => part.querySelector("img")), line = figures.find(part => part.querySelector("path.line"));
  const picture = new Uint8Array(await (await grid.reportParts.png()).arrayBuffer());
  const table = [...document.querySelectorAll(".scroll > table")].find(part => part.tBodies[0].rows.length > 10);
  const column = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[2].innerText));
  const heading = table.tHead.rows[0].cells[2], sorted = [];
  for (let i = 0; i < 2; i++) { heading.querySelector("button").click(); sorted.push([heading.getAttribute("aria-sort"), column()]); }
  const layers = [...document.querySelectorAll(".layers > details")], picker = document.querySelector(".layers select");
  const before = layers.map(part => part.hidden);
  picker.value = "1";
  picker.dispatchEvent(new Event("change"));
  line.querySelector(".tools button").click();
  return {
    figures: figures.length,
    tips: [point(grid, 0.01, 0.01), point(line, 0.0, 0.5)],
    csv: line.reportParts.csv(),
    numbers: line.querySelector(".numbers table").tBodies[0].rows.length,
    picture: [...picture.slice(0, 8)],
    bytes: picture.length,
    sorted, before,
    after: layers.map(part => part.hidden),
  };
})()"""


def test_values_are_shown_saved_sorted_and_picked(full_report: Report) -> None:
    with Browser() as browser:
        page = browser.open(full_report.html.as_uri(), 1280, 900, "light", USE)
    assert page.errors == []
    used, layers = page.values, full_report.data["routing"]["layers"]
    assert used["figures"] > 15
    first = layers[0]
    assert used["tips"][0].splitlines()[0] == f"layer {first['layer']}, expert 0"
    assert float(used["tips"][0].splitlines()[1].split()[0]) == pytest.approx(first["load"][0], rel=1e-3)
    assert used["tips"][1].startswith("layer ")
    header, *rows = used["csv"].splitlines()
    assert header.startswith("layer,")
    assert len(rows) == used["numbers"] > 1
    assert bytes(used["picture"]) == b"\x89PNG\r\n\x1a\n"
    assert used["bytes"] > 5000
    loads = sorted(round(load, 2) for layer in layers for load in layer["load"])
    assert used["sorted"] == [["ascending", loads], ["descending", loads[::-1]]]
    assert (used["before"], used["after"]) == ([False, True], [True, False])


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_serious(full_report: Report, width: int, scheme: str) -> None:
    axe = Path(str(pytest.importorskip("axe_core_python").__file__)).with_name("axe.min.js").read_text(encoding="utf-8")
    run = (
        axe
        + """;(async () => {
      document.querySelectorAll("details").forEach(part => part.open = true);
      document.querySelectorAll(".tools button:first-child").forEach(part => part.click());
      return (await axe.run()).violations.map(each => [each.id, each.impact, each.nodes[0].html]);
    })()"""
    )
    with Browser() as browser:
        page = browser.open(full_report.html.as_uri(), width, 900, scheme, run)
    assert [each for each in page.values if each[1] in ("serious", "critical", "moderate")] == []


@pytest.fixture(scope="module")
def seen(full_report: Report) -> dict[tuple[int, str], Any]:
    """What the browser saw: (width, scheme) -> page."""
    pages = {}
    with Browser() as browser:
        for width, height in ((390, 844), (1280, 900)):
            for scheme in ("light", "dark"):
                pages[width, scheme] = browser.open(full_report.html.as_uri(), width, height, scheme, LOOK)
    return pages


@pytest.fixture(params=[(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")], ids=str)
def page(request: pytest.FixtureRequest, seen: dict[tuple[int, str], Any]) -> Any:
    """One of the four."""
    return seen[request.param]


def test_nothing_leaves_the_page(page: Any, full_report: Report) -> None:
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert asked == [full_report.html.as_uri()]
    assert page.errors == []


def test_every_plot_is_drawn(page: Any, full_report: Report) -> None:
    looked = page.values
    assert len(looked["plots"]) == full_report.html.read_text().count("<figure")
    shown = [
        (width, height) for width, height, hidden in looked["plots"] if not hidden
    ]  # others are of layers that can be picked
    assert len(shown) > len(looked["plots"]) / 2
    assert [size for size in shown if size[0] <= 200 or size[1] <= 20] == []
    assert looked["images"]
    assert all(looked["images"])
    assert len(looked["marks"]) > 10
    assert all(length > 0 for length in looked["marks"])
    assert looked["bars"]
    assert all(looked["bars"])


def test_nothing_sticks_out(page: Any) -> None:
    assert page.values["page"] == page.values["width"]
    assert page.values["outside"] == []


def test_words_are_readable(page: Any) -> None:
    assert min(page.values["sizes"]) >= 12


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2.2)."""
    parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio."""
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark_differ_and_can_be_read(seen: dict[tuple[int, str], Any]) -> None:
    for width in (390, 1280):
        light, dark = seen[width, "light"].values, seen[width, "dark"].values
        assert luminance(light["paper"]) > 0.8
        assert luminance(dark["paper"]) < 0.05
        for looked in (light, dark):
            assert contrast(looked["text"], looked["paper"]) > 7
            assert all(contrast(ink, looked["paper"]) > 3 for ink in looked["ink"])  # graphics: WCAG 1.4.11


def test_the_browser_would_have_noticed(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="https://example.invalid/x.png"><script>console.error("no")</script>', encoding="utf-8")
    with Browser() as browser:
        page = browser.open(bad.as_uri(), 390, 844, "light")
    assert "https://example.invalid/x.png" in page.requests
    assert page.errors
