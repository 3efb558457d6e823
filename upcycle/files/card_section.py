"""Finds the user's own section of a model card: the lines between two marks, which are kept when the card is written again."""

from __future__ import annotations

from upcycle.errors import UsageError

BEGIN = "<!-- yours: what stands from here to the next such line is kept -->"
END = "<!-- yours: end -->"


def own_section(text: str, where: str) -> str | None:
    """Return the text between the two marks of a card, or None where the card has no marks.

    Raises:
        UsageError: one of the marks is missing, or there are several.
    """
    lines = text.splitlines()
    begins = [i for i, line in enumerate(lines) if line.rstrip() == BEGIN]
    ends = [i for i, line in enumerate(lines) if line.rstrip() == END]
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise UsageError(
            f"{where}: the user's section must begin with the line {BEGIN!r} and end with {END!r}, each once",
            hint="repair these two lines, so that none of your text is lost",
        )
    return "\n".join(lines[begins[0] + 1 : ends[0]])
