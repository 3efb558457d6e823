"""Part of every calibration text is kept to measure on, and a text that was calibrated on is told from one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import upcycle
from upcycle.files import records
from upcycle.files.locate import DEMO_FOLDER
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.held_out import by_document, by_position, seen_share, sketch, unseen
from upcycle.text.mixture import read_parts
from upcycle.text.windows import encode

Pico = Callable[[str], Path]
PROSE = (DEMO_FOLDER / "text" / "prose.txt").read_text()
OTHER = "\n".join(f"line {i} of a text that has nothing in common with any other one" for i in range(900))


def documents(count: int) -> list[str]:
    return [f"document {i}: " + PROSE[300 * i : 300 * i + 280].replace("\n", " ") for i in range(count)]


def test_documents_stay_whole_and_copies_together() -> None:
    some = documents(40)
    parts = by_document([*some, *reversed(some)], 10**9)
    inside, outside = ({one for one in some if one in part} for part in (parts.read, parts.held_out))
    assert inside | outside == set(some)
    assert not inside & outside
    assert 1 <= len(outside) <= 15  # a fraction p = 1/8 of 40 chosen by hashes: 5 expected, 15 is beyond 4.5 deviations
    assert parts.how == f"{2 * len(outside)} of 80 documents"


def test_something_is_always_held_out() -> None:
    for count in range(2, 8):
        parts = by_document(documents(count), 10**9)
        assert parts.read
        assert parts.held_out
    alone = by_document([PROSE], 10**9)
    assert alone == by_position(PROSE) == by_document([PROSE, PROSE], 10**9)
    assert alone.how == "the last quarter"
    assert alone.read + alone.held_out == PROSE
    assert 0.2 * len(PROSE) < len(alone.held_out) < 0.3 * len(PROSE)
    one_line = "word " * 400
    assert by_position(one_line).read + by_position(one_line).held_out == one_line
    assert by_position(one_line).held_out.startswith("word")


def test_only_as_much_as_is_needed_is_read() -> None:
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield documents(1)[0] + f" {len(taken)}"

    assert 3000 <= len(by_document(endless(), 3000).read) < 4000
    assert len(taken) < 40


def test_what_was_seen_is_known_by_its_lines() -> None:
    parts = by_position(PROSE)
    known = sketch([parts.read])
    assert all(len(one) == 12 for one in known)
    assert seen_share(parts.read, known) == 1
    assert seen_share(OTHER, known) == 0
    assert seen_share(parts.held_out, known) < 0.01
    assert 0.6 < seen_share(PROSE, known) < 0.9
    assert seen_share(PROSE, []) == seen_share("", known) == 0


def test_a_sketch_of_much_text_estimates() -> None:
    lines = [f"a line of some length that has the number {i} in it" for i in range(20000)]
    known = sketch(["\n".join(lines[:10000])])
    assert len(known) == 1000
    # Half of it was seen; about 2,000 of its lines are in the sample: the deviation is 0.011.
    assert seen_share("\n".join(lines), known) == pytest.approx(0.5, abs=0.05)
    assert seen_share("\n".join(lines[10000:]), known) == 0


@pytest.fixture(scope="module")
def calibrated(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A split calibrated on the user's own file, and that file."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.txt").write_text(PROSE[:40000])
    calibration = {"text": str(folder / "own.txt"), "tokens": 512, "window": 64}
    keys: dict[str, Any] = {"method": "random_split", "top_k": 4, "refit": "scale", "calibration": calibration}
    upcycle.convert(str(pico("llama")), folder / "out", verification={"tokens": 256}, **keys)
    return folder / "out", folder / "own.txt"


def test_a_conversion_is_verified_on_what_was_held_out(calibrated: tuple[Path, Path], pico: Pico) -> None:
    out, own = calibrated
    checked = records.read_verification(out)
    record = records.read_record(out)["calibration"]
    assert checked is not None
    assert checked["text"] == "what was held out of the calibration text (the last quarter)"
    assert list(record["held_out"].values()) == ["the last quarter"]
    assert seen_share(by_position(own.read_text()).read, record["lines"]) == 1
    from upcycle.architectures.stock import load_tokenizer

    again = upcycle.verify(out, tokens=256)
    assert again.text == checked["text"]
    assert again.perplexity == pytest.approx(checked["perplexity"])
    held = encode(load_tokenizer(out), by_position(own.read_text()).held_out).tolist()
    recipe = CalibrationRecipe(text=str(own), tokens=512, window=64)
    read = encode(load_tokenizer(out), read_parts(recipe)[str(own)].read).tolist()
    assert held != read[-len(held) :]


def test_a_text_that_was_calibrated_on_is_said_to_be(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    out, own = calibrated
    record = records.read_record(out)["calibration"]
    content, remark = unseen(str(own), record)
    assert content == by_position(own.read_text()).held_out
    assert remark == "the quarter that was held out of the calibration"
    renamed = tmp_path / "other.txt"
    renamed.write_text("Something new at its beginning.\n" + own.read_text())
    content, remark = unseen(str(renamed), record)
    assert content == renamed.read_text()
    assert "was calibrated on, so the numbers are too good" in remark
    new = tmp_path / "new.txt"
    new.write_text(OTHER)
    assert unseen(str(new), record) == (OTHER, "")
    assert unseen(str(renamed), None) == (renamed.read_text(), "")
    assert "was calibrated on, so the numbers are too good" in upcycle.verify(out, text=str(renamed), tokens=32).text
    texts = upcycle.evaluate(out, text=[str(own), str(renamed), str(new)], tokens=64).texts
    assert [bool(text.remark) for text in texts] == [True, True, False]


def test_the_report_says_it(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    from upcycle.report.data.subject import find_subject
    from upcycle.report.data.texts import read_domains

    out, own = calibrated
    (tmp_path / "new.txt").write_text(OTHER)
    _, domains = read_domains(find_subject(str(out)), [str(own), str(tmp_path / "new.txt")], 64)
    assert [domain.remark for domain in domains] == ["the quarter that was held out of the calibration", ""]


def test_rows_are_held_out_whole(pico: Pico, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in documents(60)))
    keys: dict[str, Any] = {"method": "random_split", "top_k": 4, "refit": "scale"}
    result = upcycle.convert(
        str(pico("llama")), tmp_path / "out", calibration={"text": str(rows), "tokens": 512, "window": 64},
        verification={"tokens": 64}, **keys,
    ).verification  # fmt: skip
    assert result is not None
    assert "documents)" in result.text


def test_a_blueprint_of_elsewhere_opens_no_text(
    calibrated: tuple[Path, Path], pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = calibrated
    monkeypatch.setattr("upcycle.text.mixture._text", lambda *_: pytest.fail("a calibration text was opened"))
    monkeypatch.setattr("upcycle.text.mixture._parts", lambda *_: pytest.fail("a calibration text was opened"))
    result = upcycle.convert(
        str(pico("llama")), tmp_path / "out", blueprint=out / "blueprint.safetensors", verification={"tokens": 32}
    )
    assert result.verification is not None
    assert result.verification.text == "embedded validation texts"
    assert upcycle.verify(tmp_path / "out", tokens=32).text == "embedded validation texts"
