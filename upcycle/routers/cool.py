"""Cool router: random directions so short that the chosen experts weigh the same."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.routers.base import LinearRouter

# Rounding the rows to bfloat16 may lengthen a difference of two rows; this leaves room for it.
_ROUNDING_MARGIN = 0.98


class CoolParameters(PluginParameters):
    """Parameters of :class:`CoolRouter`."""

    tolerance: float = Field(0.01, gt=0, lt=1, description="largest relative difference between two experts' weights")


class CoolRouter(LinearRouter):
    """Scaling a router's rows keeps its choices and draws the normalised weights towards 1/k.

    The bound holds for every possible token. The router reads ``x = w * u`` with ``w`` the norm's weight and
    ``||u|| <= sqrt(d)``, so two logits differ by at most ``sqrt(d) * ||w * (r_i - r_j)||``, and two softmax weights by a
    factor of at most its exponential. Sigmoid scores differ by less: ``sigmoid(a) / sigmoid(b) <= exp(a - b)`` for
    ``a >= b``. A LayerNorm's output is as bounded as an RMSNorm's; if it adds a bias ``b``, logits differ by up to
    ``|b (r_i - r_j)|`` more. Where nothing is normed before the FFN, ``w`` bounds the stream
    (:class:`~upcycle.ffn.feed_forward.FeedForward`).
    """

    name = "cool"
    title = "Cool random rows"
    paper = None  # our own derivation, in the docstring
    Parameters = CoolParameters
    parameters: CoolParameters

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return the rows, fp32 ``[E, d]``."""
        rows = torch.randn(len(blueprint.routed), ffn.hidden_size, generator=rng)
        return cooled(rows, ffn, self.parameters.tolerance)


def cooled(rows: torch.Tensor, ffn: FeedForward, tolerance: float) -> torch.Tensor:
    """Shorten ``rows`` ``[E, d]`` until any two experts' weights differ by at most ``tolerance`` on every input of the FFN."""
    seen = rows.double() * ffn.norm.double()
    spread = torch.cdist(seen, seen).max().item() * math.sqrt(rows.shape[1])
    if ffn.norm_bias is not None:
        added = rows.double() @ ffn.norm_bias.double()
        spread += (added.max() - added.min()).item()
    if spread == 0:
        return rows
    return rows * min(1.0, _ROUNDING_MARGIN * math.log1p(tolerance) / spread)
