"""Turns a blueprint and the dense weights into the tensors of one MoE layer, piece by piece.

Nothing is built before it is asked for: a layer of eight 7B-sized copies would take two gigabytes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch

from upcycle.errors import RefusalError
from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import MATRICES, MatrixName
from upcycle.ffn.moe_shape import Part, PartKind
from upcycle.ffn.random_weights import redrawn
from upcycle.ffn.shared_switch import half_switch
from upcycle.ffn.shifted_up import in_turn, up_scale

Tensors = Callable[[int, str], torch.Tensor]
_BIAS = "_bias"
_ALTERNATING: dict[PartKind, tuple[PartKind, PartKind]] = {
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}


class ExpertTensors:
    """The weights of one MoE layer, in the dtype of the dense FFN (but see :mod:`~upcycle.ffn.shared_switch`).

    How biases are divided, so that the layer is the dense FFN wherever its matrices alone would be. With
    ``h_j = act(gate_j x + a_j) * (up_j x + b_j)`` (or ``act(up_j x + b_j)``) the dense FFN is ``sum_j h_j down_j + c``.

    - ``h_j`` depends on neuron j's own entries ``a_j``, ``b_j`` alone. They go wherever its rows go, times the same power of
      the blueprint's scale: ``(s gate_j) x + s a_j = s (gate_j x + a_j)``. A zero neuron has zero biases.
    - The down bias ``c`` belongs to no neuron. Every routed expert holds the whole of it, without the blueprint's scale, and
      a shared expert that is a piece of the same FFN holds none. The router's weights sum to 1, so the layer adds
      ``sum_e w_e c = c``: exactly once for every router, every top-k and every scale. Weights that sum to less (the plain
      softmax with fewer experts running than there are) shrink it as they shrink the experts. Without routed experts, the
      shared ones hold it, once.
    - An expert that is another model's FFN holds that model's down bias, times ``ExpertSpec.scale``. Shared experts cut from
      one such FFN are all on, at weight 1, and hold its down bias once.

    Args:
        ffn: the dense layer.
        blueprint: what is made of it.
        tensors: reads a projection or bias of a source's FFN, by the source's index and the attribute's name in
            :class:`~upcycle.ffn.feed_forward.FeedForward`, where experts come from several models.
    """

    def __init__(self, ffn: FeedForward, blueprint: LayerBlueprint, tensors: Tensors | None = None) -> None:
        self.ffn = self._ffn = ffn
        self._tensors = tensors
        self._up_scale: float | None = None
        self.blueprint = self._blueprint = blueprint
        self._routed = [_NeuronList(expert.neurons) for expert in blueprint.routed]
        shared = [expert.neurons for expert in blueprint.shared]
        # Shared experts are always summed, so every architecture stores them as one wide FFN.
        self._shared = _NeuronList(torch.cat(shared)) if shared else None

    def part(self, part: Part) -> torch.Tensor:
        """Build one part: gate and up are ``[m, d]``, down is ``[d, m]``, their biases ``[m]``, ``[m]`` and ``[d]``, the router
        ``[E, d]`` (``[E, H]``, and ``router_hidden`` ``[H, d]``), ``gate_up`` ``[2 m, d]`` with alternating rows, ``down_rows``
        ``[m, d]``, ``output_bias`` the dense down bias ``[d]``. A bias that the dense FFN does not
        have is zero.

        Raises:
            RefusalError: a gate is asked for, and the dense FFN has none that could be written as one.
        """
        width, dtype = self._ffn.hidden_size, self._ffn.dtype
        if (kept := self._kept(part)) is not None:
            return kept.to(dtype)
        if part.kind == "shared_switch":
            return half_switch(width, dtype)
        if part.kind in ("zeros", "filled"):
            zeros = part.kind == "zeros"
            return torch.full((part.size,), 0.0 if zeros else part.factor, dtype=torch.float32 if zeros else dtype)
        if part.kind == "idle_down":
            return torch.zeros(width, part.size, dtype=dtype)
        return self._rearranged(part)

    def _kept(self, part: Part) -> torch.Tensor | None:
        """Return what is written as it is: the router, or a bias that belongs to no expert; None for other parts."""
        found = {
            "router": self._blueprint.router,
            "router_hidden": self._blueprint.router_hidden,
            "output_bias": self._ffn.down_bias,
        }
        assert part.kind not in found or found[part.kind] is not None, part.kind
        return found.get(part.kind)

    def _rearranged(self, part: Part) -> torch.Tensor:
        """Build a part of the FFN's weights, transposed or in turns where its kind says so."""
        if part.kind.startswith("shifted"):
            return self._shifted(part)
        if part.kind == "down_rows":
            return self._of_ffn(replace(part, kind="down")).T.contiguous()
        return self._alternating(part) if part.kind in _ALTERNATING else self._of_ffn(part)

    def _alternating(self, part: Part) -> torch.Tensor:
        """Build rows, or biases, of gate and up in turns."""
        return torch.stack([self._of_ffn(replace(part, kind=kind)) for kind in _ALTERNATING[part.kind]], 1).flatten(
            0, 1
        )

    def _shifted(self, part: Part) -> torch.Tensor:
        """Build a routed expert's part for ``act(gate) * (up + 1)``; see :mod:`~upcycle.ffn.shifted_up`."""
        if self._up_scale is None:
            self._up_scale = up_scale(self._ffn)
        up, gate = replace(part, factor=self._up_scale), replace(part, factor=1.0)
        if part.kind == "shifted_down":
            return self._of_ffn(replace(part, kind="down", factor=1 / self._up_scale)).T.contiguous()
        if part.kind == "shifted_gate_up":
            return in_turn(self._of_ffn(replace(gate, kind="gate")), self._of_ffn(replace(up, kind="up")))
        bias = self._of_ffn(replace(up, kind="up_bias"))
        return in_turn(self._of_ffn(replace(gate, kind="gate_bias")), bias - 1)

    def _of_ffn(self, part: Part) -> torch.Tensor:
        """Build a part that the dense FFN's weights are in."""
        where, _, matrix = part.kind.removesuffix(_BIAS).rpartition("_")
        name = matrix + _BIAS if part.kind.endswith(_BIAS) else matrix
        if self._ffn.form.doubles:
            name = name.replace("gate", "up")  # relu2(up x) is relu(up x) * up x
        if name == "down_bias":
            return self._down_bias(where, part)
        if self._ffn.tensor(name) is None:
            return self._absent(name, where, part)
        if where == "idle":
            return _NeuronList(torch.arange(part.size)).taken(self._dense(None, name), name)
        if where == "shared":
            return self._shared_tensor(name, part.factor)
        factor = part.factor * self._blueprint.scale ** self._blueprint.spread[MATRICES.index(_matrix(name))]
        return self._routed_tensor(name, part.expert, factor)

    def _absent(self, name: str, where: str, part: Part) -> torch.Tensor:
        """Return zeros for a bias that the dense FFN does not have; refuse a missing gate."""
        if name == "gate":
            raise RefusalError(
                f"layer {self._ffn.layer}: the FFN has no gate, and the target's experts have one",
                hint="choose a target with experts of the form down(act(up x))",
            )
        experts = len(self._blueprint.shared) if where == "shared" else 1
        size = part.size if where == "idle" else experts * self._blueprint.intermediate_size
        return torch.zeros(size, dtype=self._ffn.dtype)

    def _dense(self, source: int | None, name: str) -> torch.Tensor:
        """Return a projection or bias of a source's FFN, or (``None``) of the layer's own."""
        if source is None:
            found = self._ffn.tensor(name)
            assert found is not None
            return found
        assert self._tensors is not None
        return self._tensors(source, name)

    def _down_bias(self, where: str, part: Part) -> torch.Tensor:
        """Return ``[d]``: what an expert adds beside its neurons; see the class."""
        zero = torch.zeros(self._ffn.output_size, dtype=self._ffn.dtype)
        if self._ffn.down_bias is None or where == "idle":
            return zero
        if where == "shared":
            adding = [e for e in self._blueprint.shared if e.source is not None or not self._blueprint.routed]
        else:
            adding = [self._blueprint.routed[part.expert]]
        scales = {spec.source: spec.scale for spec in adding}  # one entry for all pieces of one FFN
        found = [_times(self._dense(source, "down_bias"), part.factor * scale) for source, scale in scales.items()]
        return sum(found[1:], found[0]) if found else zero

    def _routed_tensor(self, name: str, expert: int, factor: float) -> torch.Tensor:
        """Build a projection or bias of one routed expert."""
        fitted = self._fitted(name, "", expert)
        if fitted is not None:
            return _times(fitted, factor)
        return self._expert(self._routed[expert], self._blueprint.routed[expert], name, "routed", expert, factor)

    def _shared_tensor(self, name: str, factor: float) -> torch.Tensor:
        """Build a projection or bias of all shared experts, side by side."""
        assert self._shared is not None
        fitted = self._fitted(name, "shared", 0)
        if fitted is not None:
            return _times(fitted, factor)
        shared = self._blueprint.shared
        if all(spec.plain for spec in shared):
            return _times(self._shared.taken(self._dense(None, name), name), factor)
        pieces = (
            self._expert(_NeuronList(spec.neurons), spec, name, "shared", i, factor) for i, spec in enumerate(shared)
        )
        return torch.cat(list(pieces), dim=1 if name == "down" else 0)

    def _expert(
        self, neurons: _NeuronList, spec: ExpertSpec, name: str, where: str, expert: int, factor: float
    ) -> torch.Tensor:
        """Take an expert's neurons from its model, draw what is random in them, and multiply by all factors at once."""
        weight = self._drawn(neurons.taken(self._dense(spec.source, name), name), name, where, expert, spec)
        return _times(weight, factor * spec.scale if name == "down" else factor)

    def _drawn(self, weight: torch.Tensor, name: str, where: str, expert: int, spec: ExpertSpec) -> torch.Tensor:
        """Return ``weight`` with what is random in it; the numbers depend on the layer's seed, the expert and the name alone.

        The biases of fresh neurons are drawn by the same rule, which makes them zero where weights start as a new model's do.
        Noise is added to matrices alone.
        """
        draws = self._blueprint.draws
        is_bias = name.endswith(_BIAS)
        relative = draws.noise if draws and where == "routed" and not is_bias else 0.0
        noise = 0.0 if is_bias else spec.noise
        if draws is None or (spec.fresh is None and not relative and not noise):
            return weight
        fresh = None if spec.fresh is None else spec.fresh[MATRICES.index(_matrix(name))]
        if is_bias:
            draws = replace(draws, std=0.0)
            return redrawn(weight[:, None], fresh, draws, relative, noise, where, expert, name)[:, 0]
        if name == "down":
            return redrawn(weight.T, fresh, draws, relative, noise, where, expert, name).T
        return redrawn(weight, fresh, draws, relative, noise, where, expert, name)

    def _fitted(self, name: str, where: str, expert: int) -> torch.Tensor | None:
        """Return the expert's rows of a fitted gate or up projection, or its columns of a fitted down projection, if there is one."""
        whole = self._blueprint.fitted(name)
        if whole is None:
            return None
        shared, size = len(self._blueprint.shared), self._blueprint.intermediate_size
        first, count = (0, shared) if where == "shared" else (shared + expert, 1)
        some = slice(first * size, (first + count) * size)
        return (whole[:, some] if name == "down" else whole[some]).to(self._ffn.dtype)


def _matrix(name: str) -> MatrixName:
    """The projection that ``name`` is, or is the bias of."""
    return cast(MatrixName, name.removesuffix(_BIAS))


def _times(weight: torch.Tensor, factor: float) -> torch.Tensor:
    return weight if factor == 1.0 else weight * factor


class _NeuronList:
    """Numbers of neurons, whose weights are taken by slicing where they are consecutive and by gathering where they are not."""

    def __init__(self, neurons: torch.Tensor) -> None:
        self._neurons = neurons
        self._zero = neurons == ZERO_NEURON if bool((neurons == ZERO_NEURON).any()) else None
        is_run = self._zero is None and bool((neurons.diff() == 1).all())
        self._run = slice(int(neurons[0]), int(neurons[-1]) + 1) if is_run else None

    def taken(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """Return its rows of gate, up or their biases, or its columns of down."""
        return self.columns(weight) if name == "down" else self.rows(weight)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        if self._run is not None:
            return weight[self._run]
        taken = _take(weight, self._neurons, 0)
        if self._zero is not None:
            taken[self._zero] = 0
        return taken

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        if self._run is not None:
            return weight[:, self._run]
        taken = _take(weight, self._neurons, 1)
        if self._zero is not None:
            taken[:, self._zero] = 0
        return taken


def _take(weight: torch.Tensor, neurons: torch.Tensor, dim: int) -> torch.Tensor:
    """Do ``index_select`` by numpy, which gathers columns twice as fast; it has no bfloat16, so words are moved as integers."""
    words = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]).numpy()
    return torch.from_numpy(words.take(neurons.clamp(min=0).numpy(), axis=dim)).view(weight.dtype)
