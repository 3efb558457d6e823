"""Marks and ticks stand where their numbers say; images hold the right colours; large models stay light."""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch

from upcycle.report.data.routing import Choices, routing_data
from upcycle.report.drawing import heatmap as heatmap_module
from upcycle.report.drawing.bars import Bar, BarChart
from upcycle.report.drawing.diagram import layers_diagram
from upcycle.report.drawing.frame import cell_ticks, nice_ticks, number
from upcycle.report.drawing.heatmap import CELL_CODES
from upcycle.report.drawing.lines import Series, lines
from upcycle.report.drawing.png import NO_DATA, STOPS, png_uri
from upcycle.report.sections.routing import routing_view


def pixels(uri: str) -> list[list[tuple[int, ...]]]:
    """Decode a palette PNG without filters, checking every chunk's checksum."""
    data = base64.b64decode(uri.partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        body = data[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length) == (zlib.crc32(body),)
        chunks[body[:4]] = body[4:]
        position += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 3)
    raw, palette = zlib.decompress(chunks[b"IDAT"]), chunks[b"PLTE"]
    rows = [raw[y * (width + 1) : (y + 1) * (width + 1)] for y in range(height)]
    assert all(row[0] == 0 for row in rows)
    return [[tuple(palette[3 * cell : 3 * cell + 3]) for cell in row[1:]] for row in rows]


def test_png() -> None:
    image = pixels(png_uri([[0.0, 1.0, 2.0], [-5.0, None, 9.0], [1.0]], 0.0, 2.0))
    assert image[0] == [STOPS[0], STOPS[2], STOPS[4]]
    assert image[1] == [STOPS[0], NO_DATA, STOPS[4]]
    assert image[2] == [STOPS[2], NO_DATA, NO_DATA]
    (steps,) = pixels(png_uri([[i / 100 for i in range(201)]], 0.0, 2.0))
    assert len(set(steps)) == 201


def test_the_colours_stay_apart_without_red_or_green_cones() -> None:
    """Lightness rises to the middle and falls again, and both ends differ in blue, which all but tritanopes see."""
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in STOPS]
    assert light[0] < light[1] < light[2] > light[3] > light[4]
    assert STOPS[0][2] - STOPS[4][2] > 100
    assert STOPS[1][2] - STOPS[3][2] > 100


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.013), (-3, 1700), (5, 5), (0, 0), (1e-9, 2e-9)])
def test_nice_ticks(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 2 <= len(ticks) <= 7
    steps = {f"{b - a:.6e}" for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert steps.pop()[0] in "125"


def test_numbers_and_cells() -> None:
    assert [number(v) for v in (0, 0.5, 1500, 20000, 2e-6, 3e7)] == ["0", "0.5", "1,500", "20,000", "2e-6", "3e7"]
    assert nice_ticks(0, 0)[0] == 0, "nothing lies on the floor"
    assert nice_ticks(0, 0)[-1] == 1
    assert cell_ticks(["a", "b"], 8) == [(0.25, "a"), (0.75, "b")]
    assert cell_ticks(["a", "b"], 8, downwards=True) == [(0.75, "a"), (0.25, "b")]
    assert len(cell_ticks([str(i) for i in range(192)], 12)) == 12


def test_points_stand_where_their_numbers_say() -> None:
    plot = lines([Series("s", [0, 5, 10], [0.0, 0.25, 1.0])], title="T.", reading="R.", x="step", y="loss")
    (path,) = re.findall(r'class="line s0" d="([^"]*)"', str(plot.area))
    points = [tuple(map(float, point.split())) for point in path.removeprefix("M").split("L")]
    assert points == [(0, 1000), (500, 750), (1000, 0)]
    assert ("0.5", 0.5) in [(text, pytest.approx(place)) for place, text in plot.y.ticks]
    page = plot.__html__()
    assert 'role="img"' in page
    assert 'aria-label="T. R. Horizontal axis: step. Vertical axis: loss."' in page


def test_a_logarithmic_axis_leaves_out_what_it_cannot_hold() -> None:
    plot = lines(
        [Series("s", [0, 1, 2, 3], [1e-8, 0.0, None, 1.0])], title="T.", reading="", x="x", y="y", logarithmic=True
    )
    (path,) = re.findall(r'class="line s0" d="([^"]*)"', str(plot.area))
    assert path.count("L") == 1
    assert {text for _, text in plot.y.ticks} >= {"1e-8", "1e0"}


def test_bars_are_as_long_as_their_numbers() -> None:
    page = BarChart("T.", "R.", [Bar("a", 2.0, "two", 0), Bar("<b>", 1.0, "one", 1)], "unit").__html__()
    assert re.findall(r"width:([\d.]+)%", page) == ["100.00", "50.00"]
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_the_diagram_groups_layers_and_widths_are_neurons() -> None:
    dense = {"kind": "dense", "shared": 0, "routed": 0, "top_k": 0, "neurons": 96, "shared_neurons": 0}
    moe = {"kind": "moe", "shared": 2, "routed": 4, "top_k": 1, "neurons": 16, "shared_neurons": 32}
    page = str(layers_diagram([{"layer": 0, **dense}, {"layer": 1, **moe}, {"layer": 2, **moe}]))
    assert "layer 0: dense, 96 neurons; layers 1 to 2: 2 shared + 1 of 4 routed experts, 16 neurons each" in page
    starts = [float(x) for x in re.findall(r'class="routed" x="([\d.]+)"', page)]
    assert starts == pytest.approx([1000 * 16 * i / 96 for i in range(2, 6)], abs=0.06)
    assert page.count('class="shared"') == 2


def test_the_script_reads_the_characters_that_are_written() -> None:
    script = (Path(heatmap_module.__file__).parents[1] / "templates" / "script.js").read_text(encoding="utf-8")
    assert f'const codes = "{CELL_CODES}";' in script


def test_192_experts_in_30_layers_stay_light() -> None:
    experts, layers, tokens = 192, 30, 512
    rng = torch.Generator().manual_seed(0)
    choices = Choices(
        experts={i: torch.rand(tokens, experts, generator=rng).topk(24).indices for i in range(layers)},
        counts=dict.fromkeys(range(layers), experts),
        tokens=torch.randint(0, 5000, (tokens,), generator=rng),
        domains=torch.arange(tokens) % 3,
        names=["a", "b", "c"],
    )
    rows = {i: torch.randn(experts, 64, generator=rng) for i in range(layers)}
    view = routing_view(routing_data(choices, rows, str))
    drawn = [plot.__html__() for plot in view["plots"]]
    drawn += [plot.__html__() for part in view["shown"] for plot in part["plots"]]
    assert len(drawn) == 5 + 4 * 3
    assert sum(map(len, drawn)) < 1_000_000
    image = pixels(re.findall(r'src="(data:[^"]*)"', drawn[0])[0])
    assert (len(image), len(image[0])) == (layers, experts)
    # What the page's script is given of a large matrix is right to half a step of the scale.
    values = json.loads(re.findall(r'class="values">(.*?)</script>', drawn[0])[0])
    (low, high), steps = values["scale"], len(CELL_CODES) - 2
    for row, layer in zip(values["codes"], routing_data(choices, rows, str)["layers"], strict=True):
        read = [low + CELL_CODES.index(code) / steps * (high - low) for code in row]
        assert read == pytest.approx([min(high, load) for load in layer["load"]], abs=0.51 * (high - low) / steps)


def test_series_of_one_point_are_large_dots_away_from_the_frame() -> None:
    """Models side by side: the cheapest and the dearest would stand on the border."""
    plot = lines([Series("a", [1.0], [2.0]), Series("b", [3.0], [4.0])], title="t", reading="r", x="x", y="y")
    places = [float(x) for x in re.findall(r'class="dots lone s\d" d="M([\d.]+) ', str(plot.area))]
    assert len(places) == 2
    assert 0 < places[0] < places[1] < 1000
    assert str(plot.legend).count("dots lone") == 2
    joined = lines(
        [Series("a", [1.0, 2.0], [2.0, 3.0]), Series("b", [3.0], [4.0])], title="t", reading="r", x="x", y="y"
    )
    assert "lone" not in f"{joined.area}{joined.legend}"
