"""Prints tokens as a model writes them, each in the colour of its expert, or followed by the expert's number (`` the<3>``)."""

from __future__ import annotations

from upcycle.cli.shared.output import is_coloured, print_line, print_model_text, styled
from upcycle.inference.generate import Token

# Of a terminal's 256 colours, those that differ enough from each other and on which black text can be read.
_COLOURS = (117, 214, 120, 226, 183, 209, 159, 190, 219, 180, 146, 230, 75, 203, 114, 178)


class ExpertText:
    """Prints a model's tokens on stdout, marked with the expert that read them where they name one."""

    def __init__(self) -> None:
        self._coloured = is_coloured()
        self._used: set[int] = set()

    def show(self, token: Token) -> None:
        """Print one token."""
        if not token.text:
            return
        if not token.experts:
            print_model_text(token.text)
        elif self._coloured:
            expert = token.experts[0]
            self._used.add(expert)
            print_model_text(token.text, _style(expert) + (" italic" if token.prompt else ""))
        else:
            print_model_text(f"{token.text}<{token.experts[0]}>")

    def end(self) -> None:
        """Print the end of the text's last line."""
        print_model_text("\n")

    def legend(self, layer: int) -> None:
        """Print which colour stands for which expert, of those that appeared; expert 16 has the colour of expert 0, and so on."""
        if not self._used:
            return
        colours = [part for expert in sorted(self._used) for part in (styled(f" {expert} ", _style(expert)), " ")]
        print_line(f"layer {layer}: ", *colours)


def _style(expert: int) -> str:
    return f"black on color({_COLOURS[expert % len(_COLOURS)]})"
