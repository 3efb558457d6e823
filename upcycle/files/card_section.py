"""The user's own section of a model card: the lines between two marks, which are kept when the card is made anew."""

from __future__ import annotations

from upcycle.errors import UsageError

BEGIN = "<!-- yours: what stands from here to the next such line is kept -->"
END = "<!-- yours: end -->"


def own_section(text: str, where: str) -> str | None:
    """What stands between the two marked lines of a card, or None where there are no such lines.

    Raises:
        UsageError: one is missing, or there are several.
    """
    lines = text.splitlines()
    begins = [i for i, line in enumerate(lines) if line.rstrip() == BEGIN]
    ends = [i for i, line in enumerate(lines) if line.rstrip() == END]
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise UsageError(
            f"{where}: the user's section must begin with the line {BEGIN!r} and end with {END!r}, each once",
            hint="repair these two lines, so that nothing of yours is lost",
        )
    return "\n".join(lines[begins[0] + 1 : ends[0]])
