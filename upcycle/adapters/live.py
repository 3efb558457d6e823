"""Low-rank products beside the weights of a model in memory: the weights stay as they are, and both are used together.

A linear layer adds ``scale B (A x)`` to its output, so that nothing as large as its weight is made. Other parameters (fused experts,
routers) are ``W + scale B A`` while their module runs: whatever computes experts then reads ordinary weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

ADAPTER = "adapter"  # the name of the module that holds all pairs
_DOT = "/"  # in place of dots, which a module's name may not have


class LowRankPair(nn.Module):
    """The matrices of one target: ``A`` ``[r, in]`` and ``B`` ``[out, r]``, or of every expert ``[E, r, in]`` and ``[E, out, r]``.

    A begins as linear layers do, and B at zero, so that nothing changes at first (https://arxiv.org/abs/2106.09685).

    Args:
        weight: the parameter that the product is added to.
        rank: columns of B.
        scale: the product's factor.
        transposed: whether the parameter is ``[in, out]``.
    """

    def __init__(self, weight: torch.Tensor, rank: int, scale: float, transposed: bool = False) -> None:
        super().__init__()
        *experts, rows, columns = weight.shape
        inputs, outputs = (rows, columns) if transposed else (columns, rows)
        self.rank, self.scale, self.transposed = rank, scale, transposed
        self.a = nn.Parameter(weight.new_empty(*experts, rank, inputs))
        self.b = nn.Parameter(weight.new_zeros(*experts, outputs, rank))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw A anew, uniform within ``1 / sqrt(in)``, as a linear layer begins; B becomes zero."""
        bound = 1 / math.sqrt(self.a.shape[-1])
        with torch.no_grad():
            self.a.copy_((torch.rand(self.a.shape, generator=generator) * 2 - 1) * bound)
            self.b.zero_()

    def product(self) -> torch.Tensor:
        """Return what is added to the parameter, in its shape."""
        made = self.scale * (self.b @ self.a)
        return made.mT if self.transposed else made

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what is added to a linear layer's output."""
        return self.scale * nn.functional.linear(nn.functional.linear(inputs, self.a), self.b)


class Adapter(nn.ModuleDict):
    """All pairs of a model, by the names of the parameters that they are added to.

    ``whole`` has the names of parameters that belong to the adapter themselves.
    """

    def __init__(self, pairs: Mapping[str, LowRankPair], whole: Iterable[str] = ()) -> None:
        super().__init__({name.replace(".", _DOT): pair for name, pair in pairs.items()})
        self.whole = tuple(whole)

    @property
    def pairs(self) -> dict[str, LowRankPair]:
        """The pairs by the dotted names of these parameters."""
        return {name.replace(_DOT, "."): pair for name, pair in self.items()}  # type: ignore[misc]

    @property
    def names(self) -> list[str]:
        """The names in the model of all parameters that an adapter consists of."""
        halves = [f"{ADAPTER}.{name}.{half}" for name in self for half in ("a", "b")]
        return [*halves, *self.whole]


def attach(model: nn.Module, pairs: Mapping[str, LowRankPair], whole: Iterable[str] = ()) -> Adapter:
    """Let a model use pairs beside its weights, and hold them as its module ``adapter``.

    Args:
        model: any model that has none yet.
        pairs: by the dotted names of the parameters that they are added to.
        whole: names of parameters that belong to the adapter themselves.
    """
    held = Adapter(pairs, whole)
    model.add_module(ADAPTER, held)
    of_module: dict[str, dict[str, LowRankPair]] = {}
    for name, pair in pairs.items():
        path, _, parameter = name.rpartition(".")
        of_module.setdefault(path, {})[parameter] = pair
    for path, parts in of_module.items():
        module = model.get_submodule(path)
        if type(module) is nn.Linear and list(parts) == ["weight"]:
            module.register_forward_hook(_adding(parts["weight"]))
        else:
            swap = _Swap(parts)
            module.register_forward_pre_hook(swap.put)
            module.register_forward_hook(swap.take, always_call=True)
    return held


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter that :func:`attach` gave a model; None: it has none."""
    held = model._modules.get(ADAPTER)
    return held if isinstance(held, Adapter) else None


def parameter_of(name: str) -> str | None:
    """Return the parameter that the pair is added to of which ``name`` is a matrix; None: it is none of a pair."""
    first, _, rest = name.partition(".")
    return rest.rpartition(".")[0].replace(_DOT, ".") if first == ADAPTER else None


def _adding(pair: LowRankPair) -> Any:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = pair(inputs[0])
        return output + added

    return add


class _Swap:
    """Gives a module ``W + scale B A`` in the place of its parameters, while it runs.

    The sum stands in the module's ``__dict__``, where Python looks first: the parameter itself stays where optimizers, checkpoints
    and DeepSpeed found it.
    """

    def __init__(self, parts: Mapping[str, LowRankPair]) -> None:
        self._parts = parts

    def put(self, module: nn.Module, *_: Any) -> None:
        for name, pair in self._parts.items():
            weight = module._parameters[name]
            assert weight is not None
            module.__dict__[name] = weight + pair.product()

    def take(self, module: nn.Module, *_: Any) -> None:
        for name in self._parts:
            module.__dict__.pop(name, None)
