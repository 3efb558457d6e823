"""The guide to compressing says what the code takes, and what its page of measurements has."""

from __future__ import annotations

import re
from pathlib import Path

from upcycle.architectures.moe_families import MOES

ROOT = Path(__file__).resolve().parents[2]


def test_it_names_every_architecture() -> None:
    guide = (ROOT / "docs" / "guides" / "compressing.md").read_text(encoding="utf-8")
    listed = guide.partition("Models are the stock ones")[2].partition("Left out")[0]
    assert re.findall(r"`(\w+)`", listed) == list(MOES)


def test_it_has_the_numbers_of_the_page() -> None:
    def rows(name: str) -> list[list[str]]:
        lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
        return [
            [cell.strip(" `") for cell in line.strip("|").split("|")]
            for line in lines
            if re.match(r"\| \d\d% \|", line)
        ]

    def key(row: list[str]) -> tuple[str, ...]:
        method = row[1].replace("REAP as published", "reap")
        return row[0], method, row[2].replace("-", "none"), row[3], row[4]

    page = {key(row): row[6] for row in rows("measured/compress_small_moe.md")}
    guide = [row for row in rows("guides/compressing.md") if len(row) == 6]
    assert len(guide) == 11
    assert {key(row): row[5] for row in guide}.items() <= page.items()
