"""The weights of a layer's experts in the layouts that kernels read, and what every backend offers. E experts, H hidden, I width.

Stacked, as transformers stores them:
    ``up`` ``[E, 2I, H]`` (gate rows, then up rows; alternating with ``interleaved``; ``[E, I, H]`` without a gate) and
    ``down`` ``[E, H, I]``; both with their last two dimensions exchanged where ``transposed``.
Packed, upcycle's own (``widths`` is given):
    ``up`` ``[sum 2 I_e, H]``, gate and up rows alternating, and ``down`` ``[sum I_e, H]``, the transpose of each expert's
    matrix. H is contiguous in both, experts are row ranges, so that widths may differ and a tile holds gate and up of the same
    neurons.
Intermediates (pre-activations ``z`` and activations ``h``) are flat: expert e's rows start at :func:`intermediate_offsets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch

from upcycle.errors import UsageError
from upcycle.kernels.layout.dispatch import Dispatch

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
UpPart: TypeAlias = Literal["all", "gate", "up"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class WeightLayout(NamedTuple):
    """How the numbers of an :class:`ExpertWeights` are to be read; fields as there."""

    activation: str
    gated: bool
    interleaved: bool
    transposed: bool
    widths: tuple[int, ...] | None = None


class WeightTensors(NamedTuple):
    """The tensors of an :class:`ExpertWeights`; ``None`` where there is no bias."""

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer; tensors are not copied.

    Raises:
        UsageError: shapes, dtypes, devices, widths or the activation do not fit together.
    """

    up: torch.Tensor
    down: torch.Tensor
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    up_bias: torch.Tensor | None = None
    """``[E, 2I]``, or packed ``[sum 2 I_e]``; in the order of ``up``'s rows."""
    down_bias: torch.Tensor | None = None
    """``[E, H]``."""
    widths: tuple[int, ...] | None = None
    """I of every expert where packed; ``None``: stacked."""
    checked: tuple[object, ...] = field(init=False, compare=False, repr=False)
    """:func:`state_of` its tensors when they were checked."""

    def __post_init__(self) -> None:
        _check_kind(self)
        if self.widths is None:
            _check_stacked(self)
        else:
            _check_packed(self, self.widths)
        experts, rows = self.num_experts, self.rows_per_neuron
        flat = (rows * sum(self.all_widths),) if self.packed else (experts, rows * self.width(0))
        _check_tensor("up_bias", self.up_bias, self.up, flat)
        _check_tensor("down_bias", self.down_bias, self.up, (experts, self.hidden))
        object.__setattr__(self, "checked", state_of(*self.tensors))

    @classmethod
    def of(cls, tensors: WeightTensors, layout: WeightLayout) -> ExpertWeights:
        """The experts that ``tensors`` hold in ``layout``.

        Raises:
            UsageError: they do not fit together.
        """
        return cls(
            tensors.up, tensors.down, layout.activation, layout.gated, layout.interleaved, layout.transposed,
            tensors.up_bias, tensors.down_bias, layout.widths,
        )  # fmt: skip

    @property
    def tensors(self) -> WeightTensors:
        """``up``, ``down``, ``up_bias``, ``down_bias``."""
        return WeightTensors(self.up, self.down, self.up_bias, self.down_bias)

    @property
    def layout(self) -> WeightLayout:
        """How the tensors are to be read."""
        return WeightLayout(self.activation, self.gated, self.interleaved, self.transposed, self.widths)

    def without_memory(self) -> ExpertWeights:
        """A copy with shapes in place of numbers, which may be kept while the weights come and go."""
        return self.around(*(None if tensor is None else tensor.detach().to("meta") for tensor in self.tensors))

    def around(self, *tensors: torch.Tensor | None) -> ExpertWeights:
        """The same layout around other ``tensors``, in the order of :attr:`tensors`; the caller knows that they fit."""
        made = object.__new__(type(self))  # checked already; `copy` takes five times as long, for every layer and token
        made.__dict__.update(self.__dict__)
        made.__dict__.update(zip(WeightTensors._fields, tensors, strict=True))
        return made

    @property
    def packed(self) -> bool:
        """Whether experts lie one after another as row ranges, so that their widths may differ."""
        return self.widths is not None

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return len(self.up) if self.widths is None else len(self.widths)

    @property
    def hidden(self) -> int:
        """H, the size of a token's vector."""
        return self.up.shape[1] if self.transposed else self.up.shape[-1]

    @property
    def rows_per_neuron(self) -> int:
        """2 with a gate, else 1: how many rows of ``up`` and elements of z a neuron has."""
        return 2 if self.gated else 1

    @cached_property
    def all_widths(self) -> tuple[int, ...]:
        """I of every expert, on the host."""
        if self.widths is not None:
            return self.widths
        return (self.down.shape[1 if self.transposed else 2],) * self.num_experts

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """``E + 1`` sums of widths: the first neuron of every expert, where packed the first row of ``down``."""
        found = [0]
        for width in self.all_widths:
            found.append(found[-1] + width)
        return tuple(found)

    def width_offsets(self) -> torch.Tensor:
        """int64 ``[E + 1]`` on the weights' device: ``starts``."""
        return torch.tensor(self.starts, device=self.up.device)

    def width(self, expert: int) -> int:
        """I of one expert."""
        return self.all_widths[expert]

    def up_of(self, expert: int, which: UpPart = "all") -> torch.Tensor:
        """A view of one expert's ``up`` ``[2I, H]`` (``[I, H]`` without a gate), or of its gate or up rows, ``[I, H]``."""
        return self.pick(self.up, expert, which)

    def pick(self, tensor: torch.Tensor, expert: int, which: UpPart = "all") -> torch.Tensor:
        """A view as :meth:`up_of` gives one, of a tensor like ``up``, such as its gradient."""
        if self.packed:
            rows = self.rows_per_neuron
            view = tensor[rows * self.starts[expert] : rows * self.starts[expert + 1]]
        else:
            view = tensor[expert].T if self.transposed else tensor[expert]
        return self.half(view, which)

    def half(self, rows: torch.Tensor, which: UpPart) -> torch.Tensor:
        """A view of the gate or up rows of ``[2I, ...]``, which are in the order of ``up``; without a gate all are up rows."""
        if which == "all" or not self.gated:
            return rows
        second = which == "up"
        if self.interleaved:
            return rows[int(second) :: 2]
        middle = len(rows) // 2
        return rows[middle:] if second else rows[:middle]

    def down_of(self, expert: int, like: torch.Tensor | None = None) -> torch.Tensor:
        """A view of one expert's ``[H, I]``, in ``down`` or in a tensor like it."""
        tensor = self.down if like is None else like
        if self.packed:
            return tensor[self.starts[expert] : self.starts[expert + 1]].T
        return tensor[expert].T if self.transposed else tensor[expert]

    def matrices(
        self,
        which: UpPart | Literal["down"],
        experts: Sequence[int],
        like: torch.Tensor | None = None,
        turned: bool = False,
    ) -> list[torch.Tensor]:
        """Views of several experts, each as :meth:`up_of` or :meth:`down_of` gives it.

        Args:
            which: the gate or up rows or both, or ``down``.
            experts: whose.
            like: take the views of this tensor, which is like ``up`` or ``down``, such as a gradient.
            turned: transpose every view.
        """
        tensor = like if like is not None else self.down if which == "down" else self.up
        if 4 * len(experts) < self.num_experts or len(set(self.all_widths)) > 1:
            if which == "down":
                single = [self.down_of(expert, tensor) for expert in experts]
            else:
                single = [self.pick(tensor, expert, which) for expert in experts]
            return [view.T for view in single] if turned else single
        if self.packed:
            tensor = tensor.view(self.num_experts, -1, self.hidden)
        if self.transposed or (self.packed and which == "down"):
            tensor = tensor.transpose(1, 2)
        if self.gated and which in ("gate", "up"):
            middle = tensor.shape[1] // 2
            if self.interleaved:
                tensor = tensor[:, int(which == "up") :: 2]
            else:
                tensor = tensor[:, middle:] if which == "up" else tensor[:, :middle]
        # One call for all: making a view takes as long as a small product.
        views = (tensor.transpose(1, 2) if turned else tensor).unbind(0)
        return [views[expert] for expert in experts]

    def up_bias_of(self, expert: int, like: torch.Tensor | None = None) -> torch.Tensor:
        """A view of one expert's ``[2I]`` in ``up_bias``, which must be there, or in a tensor like it."""
        tensor = self.up_bias if like is None else like
        assert tensor is not None
        if self.packed:
            rows = self.rows_per_neuron
            return tensor[rows * self.starts[expert] : rows * self.starts[expert + 1]]
        return tensor[expert]


def state_of(*tensors: torch.Tensor | None) -> tuple[object, ...]:
    """Shapes, dtypes and devices: what is checked of weights, and changes when a module is moved, cast or given other weights."""
    return tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)


def pack(weights: ExpertWeights) -> ExpertWeights:
    """A copy in the packed layout; gate and up rows alternate."""
    if weights.packed and (weights.interleaved or not weights.gated):
        return weights
    experts = range(weights.num_experts)
    up = torch.cat([_alternating(weights, weights.up_of(expert)) for expert in experts])
    down = torch.cat([weights.down_of(expert).T for expert in experts])
    bias = weights.up_bias
    if bias is not None:
        bias = torch.cat([_alternating(weights, weights.up_bias_of(expert)) for expert in experts])
    return replace(
        weights, up=up, down=down, up_bias=bias, interleaved=weights.gated, transposed=False, widths=weights.all_widths
    )


def unpack(weights: ExpertWeights, interleaved: bool = False, transposed: bool = False) -> ExpertWeights:
    """A copy in a stacked layout.

    Raises:
        UsageError: experts have different widths.
    """
    if len(set(weights.all_widths)) > 1:
        raise UsageError(
            f"experts of the widths {sorted(set(weights.all_widths))} cannot be stacked in one tensor",
            hint="keep them packed, or pad them to one width with zeros",
        )
    experts = range(weights.num_experts)
    ups = [_ordered(weights, weights.up_of(expert), interleaved) for expert in experts]
    downs = [weights.down_of(expert) for expert in experts]
    if transposed:
        ups, downs = [up.T for up in ups], [down.T for down in downs]
    bias = weights.up_bias
    if bias is not None:
        bias = torch.stack([_ordered(weights, weights.up_bias_of(expert), interleaved) for expert in experts])
    return replace(
        weights,
        up=torch.stack(ups),
        down=torch.stack(downs),
        up_bias=bias,
        interleaved=interleaved and weights.gated,
        transposed=transposed,
        widths=None,
    )


def intermediate_offsets(dispatch: Dispatch, weights: ExpertWeights, per_neuron: int = 1) -> torch.Tensor:
    """int64 ``[E + 1]``, on the device: the first element of every expert in a flat intermediate.

    The sum over earlier experts of rows times width times ``per_neuron`` (``rows_per_neuron`` for z, 1 for h).
    """
    sizes = dispatch.offsets.diff() * weights.width_offsets().to(dispatch.offsets.device).diff() * per_neuron
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


class Gradients(NamedTuple):
    """Gradients that a backward pass returns, each like the tensor it belongs to; ``None`` where none was asked for."""

    x: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class Backend(Protocol):
    """Functions of a module that runs experts: Triton's, the CPU's, or the reference."""

    def forward(
        self,
        x: torch.Tensor,
        weights: ExpertWeights,
        dispatch: Dispatch,
        scores: torch.Tensor | None,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(output [T, H] like x, z)``; z is what the backward pass needs, flat, in x's dtype, and empty without ``keep``.

        Args:
            x: ``[T, H]``.
            weights: of the dtype and device of ``x``.
            dispatch: of the tokens.
            scores: fp32 (fp64 for fp64 x) ``[S]`` router weights in the slots' order; ``None``: all 1.
            keep: whether z is wanted.
        """

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weights: ExpertWeights,
        dispatch: Dispatch,
        scores: torch.Tensor | None,
        z: torch.Tensor,
        needs: Gradients,
    ) -> Gradients:
        """Gradients of everything that is not ``None`` in ``needs`` (whose values are not read).

        An empty ``z`` is computed again.
        """


def _alternating(weights: ExpertWeights, rows: torch.Tensor) -> torch.Tensor:
    return _ordered(weights, rows, True)


def _ordered(weights: ExpertWeights, rows: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if not weights.gated or weights.interleaved == interleaved:
        return rows
    gate, up = weights.half(rows, "gate"), weights.half(rows, "up")
    return torch.stack([gate, up], 1).flatten(0, 1) if interleaved else torch.cat([gate, up])


def _check_kind(weights: ExpertWeights) -> None:
    if weights.activation not in ACTIVATIONS:
        raise UsageError(
            f"experts with the activation '{weights.activation}' have no kernel",
            hint=f"available: {', '.join(ACTIVATIONS)}",
        )
    if weights.up.dtype not in DTYPES:
        raise UsageError(f"experts are {weights.up.dtype}", hint="use bfloat16, float16, float32 or float64")


def _check_stacked(weights: ExpertWeights) -> None:
    if weights.up.ndim != 3:
        raise UsageError(f"up has the shape {tuple(weights.up.shape)}; stacked experts have three dimensions")
    experts, first, second = weights.up.shape
    rows, hidden = (second, first) if weights.transposed else (first, second)
    if experts < 1:
        raise UsageError("there are no experts: up has the shape " + str(tuple(weights.up.shape)))
    if weights.gated and rows % 2:
        raise UsageError(f"up has {rows} rows per expert; with a gate there must be an even number")
    width = rows // weights.rows_per_neuron
    down = (experts, width, hidden) if weights.transposed else (experts, hidden, width)
    _check_tensor("down", weights.down, weights.up, down)


def _check_packed(weights: ExpertWeights, widths: tuple[int, ...]) -> None:
    if not widths or min(widths) < 1:
        raise UsageError(f"widths are {widths}: there must be experts, and each at least 1 wide")
    if weights.transposed or (weights.gated and not weights.interleaved):
        raise UsageError("packed experts have alternating gate and up rows and are not transposed")
    if weights.up.ndim != 2:
        raise UsageError(f"up has the shape {tuple(weights.up.shape)}; packed experts have two dimensions")
    hidden = weights.up.shape[1]
    _check_tensor("up", weights.up, weights.up, (weights.rows_per_neuron * sum(widths), hidden))
    _check_tensor("down", weights.down, weights.up, (sum(widths), hidden))


def _check_tensor(name: str, tensor: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{name} has the shape {tuple(tensor.shape)}, not {shape}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise UsageError(f"{name} is {tensor.dtype} on {tensor.device}, up {like.dtype} on {like.device}")
