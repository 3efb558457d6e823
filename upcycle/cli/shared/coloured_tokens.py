"""Shows tokens as they come, each in the colour of its expert; without colours, each with its expert's number behind it."""

from __future__ import annotations

from upcycle.cli.shared.output import is_coloured, show, styled, write
from upcycle.inference.generate import Token

# Of the 256 colours of a terminal: told apart beside each other, and black can be read on all of them.
_COLOURS = (117, 214, 120, 226, 183, 209, 159, 190, 219, 180, 146, 230, 75, 203, 114, 178)


class ExpertText:
    """Prints tokens on stdout. ``experts`` is how many there are in the layer; 0 prints the text alone."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._coloured = is_coloured()
        self._used: set[int] = set()

    def show(self, token: Token) -> None:
        """Print one token."""
        if not token.text:
            return
        if not token.experts:
            write(token.text)
        elif self._coloured:
            expert = token.experts[0]
            self._used.add(expert)
            write(token.text, _style(expert) + (" italic" if token.prompt else ""))
        else:
            write(f"{token.text}<{token.experts[0]}>")

    def end(self) -> None:
        """End the text's last line."""
        write("\n")

    def legend(self, layer: int) -> None:
        """Which colour is which expert, of those that were seen; colours come again behind the sixteenth."""
        if not self._used:
            return
        colours = [part for expert in sorted(self._used) for part in (styled(f" {expert} ", _style(expert)), " ")]
        show(f"layer {layer}: ", *colours)


def _style(expert: int) -> str:
    return f"black on color({_COLOURS[expert % len(_COLOURS)]})"
