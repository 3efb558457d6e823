"""Shows tokens as they come, each in the colour of its expert; without colours, each with its expert's number behind it."""

from __future__ import annotations

from rich.text import Text

from upcycle.cli.output import stdout, write
from upcycle.generation import Token

# Of the 256 colours of a terminal: told apart beside each other, and black can be read on all of them.
_COLOURS = (117, 214, 120, 226, 183, 209, 159, 190, 219, 180, 146, 230, 75, 203, 114, 178)
# What a terminal would obey instead of showing it: a model may write anything.
_OBEYED = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A}, "\ufffd")


class ExpertText:
    """Prints tokens on stdout. ``experts`` is how many there are in the layer; 0 prints the text alone."""

    def __init__(self, experts: int) -> None:
        self._console = stdout()
        self._experts = experts
        self._coloured = self._console.is_terminal and not self._console.no_color and bool(self._console.color_system)
        self._used: set[int] = set()

    def show(self, token: Token) -> None:
        """Print one token."""
        text = token.text.translate(_OBEYED) if self._console.is_terminal else token.text
        if not text:
            return
        if not token.experts:
            write(text)
        elif self._coloured:
            expert = token.experts[0]
            self._used.add(expert)
            self._print(Text(text, style=_style(expert) + (" italic" if token.prompt else "")))
        else:
            write(f"{text}<{token.experts[0]}>")

    def end(self) -> None:
        """End the text's last line."""
        write("\n")

    def legend(self, layer: int) -> None:
        """Which colour is which expert, of those that were seen; colours come again behind the sixteenth."""
        if not self._used:
            return
        line = Text(f"layer {layer}: ")
        for expert in sorted(self._used):
            line.append(f" {expert} ", style=_style(expert))
            line.append(" ")
        self._print(line.append("\n"))

    def _print(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)
        self._console.file.flush()


def _style(expert: int) -> str:
    return f"black on color({_COLOURS[expert % len(_COLOURS)]})"
