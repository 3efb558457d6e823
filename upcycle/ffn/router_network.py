"""What computes a router's logits: one matrix, or two with an activation between. T tokens, E experts, H hidden, d."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch.nn.functional import linear, normalize

if TYPE_CHECKING:
    from typing_extensions import Self

RouterActivation = Literal["tanh", "relu"]


@dataclass(frozen=True)
class RouterForm:
    """The form of a router: ``rows x``, or ``rows act(hidden x)``, with what is done before and behind.

    Attributes:
        width: H, of the hidden layer; 0: there is none.
        activation: of the hidden layer.
        absolute: whether logits are absolute values: predictions of something that is not negative.
        unit_inputs: whether inputs are divided by their length first.
        bias: what every logit has added before anything is trained; None: the router has no bias.
    """

    width: int = 0
    activation: RouterActivation = "relu"
    absolute: bool = False
    unit_inputs: bool = False
    bias: float | None = None

    @property
    def linear(self) -> bool:
        """Whether it is one matrix, which stock routers are."""
        return not self.width

    def elements(self, experts: int, hidden_size: int) -> int:
        """Return how many weights it has."""
        rows = experts * hidden_size if self.linear else self.width * (experts + hidden_size)
        return rows + (0 if self.bias is None else experts)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the first matrix reads, for inputs ``[T, d]``."""
        return normalize(x, dim=-1) if self.unit_inputs else x

    def activated(self, z: torch.Tensor) -> torch.Tensor:
        """Return the hidden layer ``[T, H]`` of its sums."""
        return z.tanh() if self.activation == "tanh" else z.relu()

    def behind(self, z: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[T, E]`` of the last matrix's sums."""
        return z.abs() if self.absolute else z


LINEAR = RouterForm()


@dataclass(frozen=True)
class RouterNetwork:
    """A router's weights.

    Attributes:
        rows: ``[E, d]``, or ``[E, H]`` behind a hidden layer.
        hidden: ``[H, d]``, where there is a hidden layer.
        form: how they are used.
    """

    rows: torch.Tensor
    hidden: torch.Tensor | None = None
    form: RouterForm = LINEAR

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[T, E]`` for inputs ``[T, d]``."""
        x = self.form.before(x)
        if self.hidden is not None:
            x = self.form.activated(linear(x, self.hidden))
        z = linear(x, self.rows)
        return self.form.behind(z if self.form.bias is None else z + self.form.bias)

    def stored_as(self, dtype: torch.dtype) -> Self:
        """Return it in fp32, with the weights that are left once they were stored in a dtype."""
        hidden = None if self.hidden is None else self.hidden.to(dtype).float()
        return replace(self, rows=self.rows.to(dtype).float(), hidden=hidden)


class Routes(Protocol):
    """A routing rule other than the usual top-k, as one layer needs it: see :mod:`upcycle.models.own.routing`."""

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what every expert weighs, ``[T, E]``; 0: it does not run."""

    def equal_weight(self, experts: int) -> float:
        """Return what an expert that runs weighs where all logits are equal."""

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """Return whether every expert runs for every token, at that weight."""

    def mean_experts(self, experts: int) -> float:
        """Return how many of the experts a token has in the mean, or at most where that is not known before."""
