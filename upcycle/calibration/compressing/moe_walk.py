"""Walks the layers of a Mixture-of-Experts on text, one in memory at a time, and shows what routers and experts did.

N windows of W tokens, T = N W, d the hidden size, E experts, K per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from upcycle.architectures.module_paths import module_paths_of
from upcycle.models.body_pass import layer_arguments
from upcycle.models.experts import use_eager_experts
from upcycle.models.first_calls import settle_code_paths
from upcycle.models.own.factored_experts import FactoredExperts
from upcycle.models.own.moe_block import PackedExperts
from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.router_records import watch_router
from upcycle.trainers.routing.stock_routers import RouterPlace, find_routers

if TYPE_CHECKING:
    from upcycle.models.stock_layers import Layers
    from upcycle.progress import Progress

WALK_TOKENS = 4096


@dataclass(frozen=True)
class Routed:
    """What one layer did with a batch of t tokens, all fp32 and in the order of the stock class.

    Attributes:
        x: ``[t, d]``, the input of the experts.
        logits: ``[t, E]``, the router's.
        experts: ``[t, K]``, those that were chosen.
        weights: ``[t, K]``, theirs.
        output: ``[t, d]``, the sum of the chosen experts, weighted.
        block: ``[t, d]``, the output of experts and shared ones; see :meth:`MoeWalk.added`.
        shared: ``[t, F]``, the activations of the shared experts' neurons; None: there are none.
        shared_weight: ``[t, 1]``, what the shared experts' output is multiplied by.
    """

    x: torch.Tensor
    logits: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor
    block: torch.Tensor
    shared: torch.Tensor | None
    shared_weight: torch.Tensor


@dataclass(frozen=True)
class ExpertRun:
    """What one expert did with the t tokens that chose it.

    Attributes:
        expert: its number.
        x: ``[t, d]``, its inputs.
        weights: ``[t]``, its weights, fp32.
        active: ``[t, F]``, the activations of its neurons.
        output: ``[t, d]``, its output before it is weighted.
    """

    expert: int
    x: torch.Tensor
    weights: torch.Tensor
    active: torch.Tensor
    output: torch.Tensor


def walk_both(
    uncut: MoeWalk,
    cut: MoeWalk,
    windows: torch.Tensor,
    fit: Callable[[int, torch.Tensor, torch.Tensor], None],
    progress: Progress,
    phase: str,
) -> None:
    """Walk two models of as many layers side by side.

    Args:
        uncut: the one.
        cut: the other.
        windows: token ids ``[N, W]``.
        fit: receives the index of every layer, loaded in both, and both streams ``[N, W, d]`` before it; the layer of ``cut`` then
            computes with what it changed.
        progress: where to report.
        phase: what is done, for the report.
    """
    with progress.phase(phase, len(uncut.layers)):
        theirs = torch.cat([uncut.embed(windows[batch]) for batch in uncut.batches(len(windows))])
        ours = theirs.clone()
        for index in range(len(uncut.layers)):
            with uncut.loaded(index), cut.loaded(index):
                fit(index, theirs, ours)
                for batch in uncut.batches(len(windows)):
                    theirs[batch] = uncut.run(index, theirs[batch])
                    ours[batch] = cut.run(index, ours[batch])
            progress.advance()


class MoeWalk:
    """Runs the layers of a stock MoE, by its own code.

    Args:
        layers: the model, whose layers are loaded one by one.
        window: tokens per sequence.
    """

    def __init__(self, layers: Layers, window: int) -> None:
        settle_code_paths()
        self._weights, self.model = layers, use_eager_experts(layers.model.eval())
        self._paths = module_paths_of(self.model.config)
        self.layers = self._paths.layers_in(self.model)
        self.places: dict[int, RouterPlace] = {place.index: place for place in find_routers(self.model)}
        self.multiplier = float(getattr(self.model.config, "residual_multiplier", None) or 1.0)
        self._window = window
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the states ``[N, W, d]`` that the first layer reads for token ids ``[N, W]``."""
        states, _ = layer_arguments(self.model, self._paths, self.layers, {"input_ids": windows, "use_cache": False})
        return states

    def forget_embeddings(self) -> None:
        """Free the embeddings, once nothing is embedded any more."""
        self.model.get_input_embeddings().to("meta")

    def norm_behind(self, index: int) -> torch.nn.Module | None:
        """Return the norm that a layer's experts pass before they are added to the stream (FlexOlmo); None: there is none."""
        return getattr(self.layers[index], "post_feedforward_layernorm", None)

    def added(self, index: int, block: torch.Tensor) -> torch.Tensor:
        """Return what the stream gets of the experts' output ``[t, d]`` in a loaded layer."""
        norm = self.norm_behind(index)
        with torch.no_grad():
            return self.multiplier * (block if norm is None else norm(block))

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Load the weights of a layer inside the ``with`` block."""
        self._weights.load(index)
        try:
            yield
        finally:
            self._weights.drop(index)

    def batches(self, count: int) -> Iterator[slice]:
        """Yield the windows of each batch, of ``count`` in all."""
        size = max(1, WALK_TOKENS // self._window)
        return (slice(first, min(first + size, count)) for first in range(0, count, size))

    @torch.no_grad()
    def run(
        self,
        index: int,
        states: torch.Tensor,
        see: Callable[[Routed], None] | None = None,
        see_expert: Callable[[ExpertRun], None] | None = None,
    ) -> torch.Tensor:
        """Return a loaded layer's output ``[n, W, d]`` for its input of the same shape.

        Args:
            index: the layer.
            states: its input.
            see: receives what its router and experts did, if it has any; it runs without gradients, too.
            see_expert: receives what every chosen expert did, one after another, before that.
        """
        place = self.places.get(index)
        layer = self.layers[index]
        if see is None or place is None:
            return _tensor(layer(states, **self._others(index, states)))
        inputs: list[tuple[torch.Tensor, ...]] = []
        parts: list[torch.Tensor] = []
        shared: list[torch.Tensor] = []
        switch: list[torch.Tensor] = []
        down, gate = shared_modules(place)
        handles = [
            *([] if down is None else [down.register_forward_pre_hook(lambda _, given: shared.append(given[0]))]),
            *([] if gate is None else [gate.register_forward_hook(lambda _, __, made: switch.append(made))]),
            place.experts.register_forward_hook(lambda _, given, made: inputs.append((*given[:3], _tensor(made)))),
            *(
                block.register_forward_hook(lambda _, __, made: parts.append(_tensor(made)))
                for block in (place.block, *place.beside)
            ),
        ]
        try:
            with Recorder[Any](layer) as recorder, _seen(place.experts, see_expert):
                watch_router(
                    recorder, place.block, place.router, lambda logits, weights, experts: (logits, weights, experts)
                )
                output = _tensor(layer(states, **self._others(index, states)))
                ((logits, _, _),) = recorder.take()
        finally:
            for handle in handles:
                handle.remove()
        ((x, experts, weights, made),) = inputs
        flat = [_flat(part) for part in parts]
        see(
            Routed(
                x=_flat(x),
                logits=_flat(logits).float(),
                experts=experts,
                weights=weights.float(),
                output=_flat(made),
                block=torch.stack(flat).sum(0),
                shared=_flat(shared[0]).float() if shared else None,
                shared_weight=_flat(switch[0]).sigmoid() if switch else torch.ones(_flat(x).shape[0], 1),
            )
        )
        return output

    def _others(self, index: int, states: torch.Tensor) -> dict[str, Any]:
        count = len(states)
        if count not in self._arguments:
            zeros = torch.zeros(states.shape)
            _, seen = layer_arguments(
                self.model, self._paths, self.layers, {"inputs_embeds": zeros, "use_cache": False}
            )
            self._arguments[count] = seen
        return self._arguments[count][index]


@contextmanager
def _seen(experts: Any, see: Callable[[ExpertRun], None] | None) -> Iterator[None]:
    """Let a stock class's experts compute in the ``with`` block as their class does ("eager"), and hand on what each one did.

    What they did is needed as well as their sum, and would have to be computed twice otherwise.
    """

    def forward(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in range(len(experts.down_proj)):
            tokens, slots = torch.where(chosen == expert)
            if len(tokens):
                own, inputs = weights[tokens, slots], x[tokens]
                active = active_neurons(experts, inputs, expert)
                output = linear(active, down_projection(experts, expert), down_bias(experts, expert))
                total.index_add_(0, tokens, (output * own[:, None]).to(total.dtype))
                assert see is not None
                see(ExpertRun(expert, inputs, own.float(), active, output))
        return total

    if see is None:
        yield
        return
    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def shared_modules(place: RouterPlace) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    """Return the down projection of a layer's shared experts, and what the sigmoid of multiplies their output; None: there is none."""
    named = [
        (name, module)
        for block in (place.block, *place.beside)
        for name, module in block.named_modules()
        if module is not place.experts
    ]
    down = [module for name, module in named if name.rpartition(".")[2] in ("down_proj", "output_linear")]
    gate = [module for name, module in named if name == "shared_expert_gate"]
    assert len(down) <= 1, "shared experts are one FFN"
    return (down[0] if down else None), (gate[0] if gate else None)


def active_neurons(experts: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """Return the activations ``[t, F]`` of an expert's neurons for inputs ``[t, d]``.

    ``experts`` is a stock class's module, or upcycle's own.
    """
    if isinstance(experts, PackedExperts | FactoredExperts):
        return experts.active(x, expert)
    active: torch.Tensor
    if is_clamped(
        experts
    ):  # the class has inputs before outputs, and computes what it makes of gate and up, which take turns
        active = experts._apply_gate(
            x @ experts.gate_up_proj[expert].detach() + experts.gate_up_proj_bias[expert].detach()
        )
        return active
    gate, up = linear(x, experts.gate_up_proj[expert].detach()).chunk(2, dim=-1)
    active = experts.act_fn(gate) * up
    return active


def is_clamped(experts: Any) -> bool:
    """Return whether a module holds GPT-OSS's experts: see :class:`~upcycle.architectures.moe_families.MoeFamily`."""
    return hasattr(experts, "gate_up_proj_bias")


def expert_neurons(experts: Any) -> int:
    """Return the number of neurons of an expert of a stock class's module."""
    return int(experts.down_proj.shape[-2 if is_clamped(experts) else -1])


def down_projection(experts: Any, expert: int) -> torch.Tensor:
    """Return the down projection ``[d, F]`` of one expert of a stock class's module."""
    found: torch.Tensor = experts.down_proj[expert].detach()
    return found.mT if is_clamped(experts) else found


def down_bias(experts: Any, expert: int) -> torch.Tensor | None:
    """Return the bias ``[d]`` of one expert's output; None: it has none."""
    return experts.down_proj_bias[expert].detach() if is_clamped(experts) else None


def down_projections(experts: Any) -> torch.Tensor:
    """Return the down projections ``[E, d, F]`` of a stock class's module, or of upcycle's own; of factored ones the last factor."""
    if isinstance(experts, FactoredExperts):
        return experts.down_projections()
    if isinstance(experts, PackedExperts):
        rows: torch.Tensor = experts.down.detach().unflatten(0, (experts.count, -1))
        return rows.mT
    found: torch.Tensor = experts.down_proj.detach()
    return found.mT.contiguous() if is_clamped(experts) else found


def set_down_projections(experts: Any, down: torch.Tensor) -> None:
    """Let the module compute with other down projections, ``[E, d, F]``."""
    if isinstance(experts, FactoredExperts):
        experts.set_down_projections(down)
    elif isinstance(experts, PackedExperts):
        experts.down.data = down.mT.flatten(0, 1).contiguous()
    else:
        experts.down_proj.data = down.mT.contiguous() if is_clamped(experts) else down


def _tensor(made: Any) -> torch.Tensor:
    found: torch.Tensor = made[0] if isinstance(made, tuple) else made
    return found


def _flat(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])
