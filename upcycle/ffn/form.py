"""The form of a feed-forward network: which projections and biases it has, and where its activation stands. No tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MatrixName = Literal["gate", "up", "down"]
MATRICES: tuple[MatrixName, ...] = ("gate", "up", "down")  # as the rows of ExpertSpec.fresh and the powers of a spread
# The p for which act(s z) = s**p act(z) for every s > 0; no other activation has one.
_DEGREES: Mapping[str, int] = {"relu": 1, "relu2": 2}
# The activation f for which act(z) = f(z) z: act(up x) is a gated neuron whose gate and up are the same row.
_FACTORS: Mapping[str, str] = {"relu2": "relu"}
_MULTIPLE = 8  # of neurons: what grouped matrix products ask of an expert's width


@dataclass(frozen=True)
class FfnForm:
    """What an FFN is made of; all FFNs of a model have the same form.

    With a gate it is ``down(act(gate x) * up x)``, without one ``down(act(up x))``. ``biases`` names the projections that
    add one, ``activation`` is the configuration's ``hidden_act``.
    """

    activation: str = "silu"
    gated: bool = True
    biases: frozenset[MatrixName] = frozenset()

    @property
    def matrices(self) -> tuple[MatrixName, ...]:
        """The projections that exist, in the order of :data:`MATRICES`."""
        return MATRICES if self.gated else MATRICES[1:]

    @property
    def activated(self) -> MatrixName:
        """The projection whose output goes through the activation."""
        return self.matrices[0]

    @property
    def doubles(self) -> bool:
        """Whether a neuron without a gate is a gated one whose gate and up are the same row."""
        return not self.gated and self.activation in _FACTORS

    @property
    def needs_constant(self) -> bool:
        """Whether gated experts without biases can be this FFN only if their input has a direction that is always 1."""
        return bool(self.biases) or not (self.gated or self.doubles)

    @property
    def as_gated(self) -> FfnForm:
        """The form of gated experts without biases that compute the same."""
        return FfnForm(_FACTORS[self.activation] if self.doubles else self.activation)

    def width_as_gated(self, width: int) -> int:
        """Return how many neurons such an expert has for ``width`` of this form: a down bias takes one (and up to 7 fill up)."""
        return width if "down" not in self.biases else -(-(width + 1) // _MULTIPLE) * _MULTIPLE

    def scales_output(self, powers: tuple[float, float, float]) -> bool:
        """Whether multiplying gate, up and down (and the biases of the first two) by ``s ** powers`` multiplies the output by s.

        Projections that the activation does not see count with their power. The activated one counts with its power times the
        activation's degree of homogeneity; where that has none (silu, gelu), no power may be there.
        """
        by_name = dict(zip(MATRICES, powers, strict=True))
        inside = by_name[self.activated]
        outside = sum(by_name[matrix] for matrix in self.matrices[1:])
        if inside and self.activation not in _DEGREES:
            return False
        return math.isclose(outside + inside * _DEGREES.get(self.activation, 0), 1.0)
