"""Where the layers of a stock model keep the projections of their attention."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

# Attention that mixes tokens by a recurrence has gates and convolutions in it, which are another matter.
_ATTENTION, _LINEAR_ATTENTION = re.compile(r"(^|[._])(\w*attn|\w*attention)(\.|$)", re.IGNORECASE), "linear_attn"


@dataclass(frozen=True)
class AttentionProjection:
    """One matrix of a layer's attention, with its bias: q, k, v or o, or several of them in one.

    Attributes:
        layer: its layer's number.
        path: of its module, below the layer.
        inputs: the length of what it reads.
        outputs: the length of what it makes.
    """

    layer: int
    path: str
    inputs: int
    outputs: int


def projections_in(layer: nn.Module, number: int, without: tuple[str, ...] = ()) -> list[AttentionProjection]:
    """Return the projections of one layer, in the order of its modules.

    Args:
        layer: the module, of which shapes alone are looked at.
        number: the layer's.
        without: paths below the layer of what is no attention: its FFN.
    """
    from transformers.pytorch_utils import Conv1D

    found = []
    for path, module in layer.named_modules():
        inside = any(path == other or path.startswith(f"{other}.") for other in without)
        if inside or not isinstance(module, nn.Linear | Conv1D):
            continue
        if _ATTENTION.search(path) and _LINEAR_ATTENTION not in path:
            rows, columns = module.weight.shape
            sizes = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            found.append(AttentionProjection(number, path, *sizes))
    return found


def applied(module: Any) -> tuple[Any, Any]:
    """Return the matrix ``[out, in]`` and the bias ``[out]`` (None: there is none) of such a module."""
    from transformers.pytorch_utils import Conv1D

    return (module.weight.T if isinstance(module, Conv1D) else module.weight), module.bias
