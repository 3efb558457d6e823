"""Prints rows that are trained on: what is only read is dim in a terminal with colours, and marked elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle.cli.shared.output import is_coloured, print_line, print_model_text, styled

if TYPE_CHECKING:
    from upcycle.trainers.run.shown_rows import ShownRow

_MARKS = "[-", "-]"  # as word-wise diffs mark what is taken away


def print_training_rows(rows: Sequence[ShownRow]) -> None:
    """Print rows on stdout, document by document."""
    coloured = is_coloured()
    if coloured:
        print_line(styled("Grey text", "dim"), " is read, but not learned.")
    else:
        print_line(f"What is between {_MARKS[0]} and {_MARKS[1]} is read, but not learned.")
    for number, row in enumerate(rows, start=1):
        print_line()
        count = len(row.documents)
        print_line(
            styled(f"row {number}", "bold"),
            f", domain {row.domain}: {row.tokens:,} tokens, {row.learned:,} of them learned, in {count:,} "
            f"document{'' if count == 1 else 's'}, and {row.padding:,} of padding",
        )
        for place, document in enumerate(row.documents, start=1):
            print_line(styled(f"--- document {place} of row {number}", "bold"))
            for part in document:
                if coloured or part.learned:
                    print_model_text(part.text, "" if part.learned else "dim")
                else:
                    print_model_text(part.text.join(_MARKS))
            print_model_text("\n")
