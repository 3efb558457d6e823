"""What was measured is kept, and is not measured again."""

from __future__ import annotations

from pathlib import Path

from upcycle.files.measured import MeasurementCache


def never() -> float:
    raise AssertionError("measured again")


def test_measured_once_and_read_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    first = MeasurementCache(path)
    assert first("a", lambda: 0.1 + 0.2) == 0.1 + 0.2
    assert first("a", never) == 0.1 + 0.2
    assert first("b", lambda: [1e-300, 2 / 3]) == [1e-300, 2 / 3]
    again = MeasurementCache(path)
    assert again("a", never) == 0.1 + 0.2
    assert again("b", never) == [1e-300, 2 / 3]


def test_a_line_that_was_being_written_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    MeasurementCache(path)("a", lambda: 1.5)
    path.write_text(path.read_text() + '["b", 2.')
    again = MeasurementCache(path)
    assert again("b", lambda: 2.5) == 2.5
    assert MeasurementCache(path)("b", never) == 2.5
    assert MeasurementCache(path)("a", never) == 1.5
