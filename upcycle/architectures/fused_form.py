"""How files hold the matrices of all experts in one tensor, and how that differs from one expert's matrices one by one.

E experts, F neurons each, d the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Layout = tuple[int, ...]


@dataclass(frozen=True)
class FusedForm:
    """Says how a stored tensor of experts' matrices differs from ``[..., 2 F, d]`` (gate before up) or ``[..., d, F]`` (down).

    Attributes:
        transposed: its last two dimensions are the other way round.
        interleaved: rows (columns, where transposed) of gate and up take turns.
        square: transformers tells by the shape alone whether it is transposed, so that a square one never is.
    """

    transposed: bool = False
    interleaved: bool = False
    square: bool = False

    def plain(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a stored matrix ``[..., rows, columns]`` with gate before up, and outputs before inputs."""
        import torch

        made = matrix.mT if self.transposed else matrix
        return torch.cat([made[..., ::2, :], made[..., 1::2, :]], -2) if self.interleaved else made

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the inverse of :meth:`plain`; see ``square``."""
        import torch

        made = matrix
        if self.interleaved:
            made = torch.stack(matrix.chunk(2, -2), -2).flatten(-3, -2)
        return (made.mT if self.turns(matrix.shape) else made).contiguous()

    def plain_shape(self, stored: Layout) -> Layout:
        """Return the shape that :meth:`plain` gives."""
        return (*stored[:-2], stored[-1], stored[-2]) if self.transposed else stored

    def stored_shape(self, plain: Layout) -> Layout:
        """Return the shape that :meth:`stored` gives."""
        return (*plain[:-2], plain[-1], plain[-2]) if self.turns(plain) else plain

    def turns(self, plain: Layout) -> bool:
        """Return whether :meth:`stored` transposes a matrix of this shape."""
        return self.transposed and not (self.square and plain[-1] == plain[-2])


PLAIN = FusedForm()
_CLAMPED = {"gate_up": FusedForm(transposed=True, interleaved=True), "down": FusedForm(transposed=True)}


def clamped_form(part: str) -> FusedForm:
    """Return how GPT-OSS's class and files hold ``gate_up`` or ``down``; biases are plain but for gate and up in turns."""
    return _CLAMPED.get(part, PLAIN)


def fused_form_of(origin: object) -> FusedForm:
    """Return how the tensor that an origin describes holds experts' matrices; ``PLAIN`` where it does not say."""
    found: FusedForm = getattr(origin, "form", PLAIN)
    return found
