"""Measures the errors of single blocks: what a converted layer adds to the stream, against what the dense layer adds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from upcycle.architectures.towers.parts import PartsFamily
from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.ffn.gated_experts import ConstantInput
from upcycle.models.experts import expert_outputs
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.stock_layers import layers_of
from upcycle.models.stock_model import output_of
from upcycle.verification.verdict import relative

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.utils.hooks import RemovableHandle

    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.models.stock_layers import Layers
    from upcycle.models.stock_model import StockModel
    from upcycle.planning.expert_job import ExpertJob


class LayerErrors:
    """Adds up squared errors and norms of every block, in fp64, on the inputs of the dense model's FFNs.

    Args:
        job: the conversion.
        moe: its result.
        checkpoint: its source.
    """

    def __init__(self, job: ExpertJob, moe: StockModel, checkpoint: DenseCheckpoint) -> None:
        self._job = job
        mixes = isinstance(checkpoint, MixedCheckpoint) and not (job.method.exact_when_all_active or job.method.draws)
        self._mixed = checkpoint if isinstance(checkpoint, MixedCheckpoint) and mixes else None
        self._moe = moe
        self._sources: dict[int, Layers] = {}
        self._own_input: torch.Tensor | None = None
        # Whole models in memory number the layers of their text model alone.
        self._parts = job.family.module_paths if isinstance(job.family, PartsFamily) else None
        count = job.dense.num_hidden_layers
        self._squares = torch.zeros(4, count, dtype=torch.float64)  # error, with all experts, norm, norm of their mean
        # After a refit, or with overlapping experts, all experts together are not the dense FFN: there is nothing to compare.
        comparable = (job.method.exact_when_all_active or mixes) and job.refit == "none"
        self.all_experts_measured = job.promise[0] == "approximate" and comparable

    @contextmanager
    def measured_on(self, dense: StockModel) -> Iterator[None]:
        """Compare block by block while the dense model runs inside the ``with`` block."""
        layers = dense.layers
        if self._parts is not None:
            layers = [dense.model.get_submodule(self._parts.layer(i)) for i in range(self._job.dense.num_hidden_layers)]
        hooks = [hook for i, layer in enumerate(layers) for hook in self._hooks(i, layer)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, index: int, layer: Module) -> Iterator[RemovableHandle]:
        """Yield hooks on the first and the last module of a layer's FFN, which are one in most architectures.

        Where the norm is folded into the experts, there is one on the norm before it, too.
        """
        family, inputs = self._job.family, list[torch.Tensor]()
        paths = family.module_paths
        place = paths.place(index)
        first, last = layer.get_submodule(place.first), layer.get_submodule(place.ends or place.first)
        yield first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        # A layer may add to the output in place.
        yield last.register_forward_hook(lambda _, args, output: self._compare(index, inputs.pop(), output.clone()))
        if self._job.target.folded(self._job.dense):
            norm = family.ffn_names(0)["norm"].removesuffix(".weight").removeprefix(f"{paths.layer(0)}.")
            yield layer.get_submodule(norm).register_forward_hook(
                lambda _, args, __: self._renormed(index, norm, args[0])
            )

    def _renormed(self, index: int, norm: str, stream: torch.Tensor) -> None:
        """Keep what the MoE's own norm makes of the stream before a dense FFN, where its experts read another input."""
        with torch.no_grad():
            self._moe.load(index)
            self._own_input = self._moe.layers[index].get_submodule(norm)(stream)

    def _compare(self, index: int, x: torch.Tensor, expected: torch.Tensor) -> None:
        with torch.no_grad():
            blocks = self._blocks(index)
            own, self._own_input = x if self._own_input is None else self._own_input, None
            centred = self._job.target.centred(self._job.dense) is not None
            expected = _without_mean(expected) if centred else expected
            actual = self._added(index, blocks, own)
            self._squares[0, index] += (actual - expected).double().square().sum()
            if self.all_experts_measured and index in self._job.shape.moe_layers:
                everyone = _all_experts(blocks, own, self._job)
                reference = self._mean_of_sources(index, x, own) if self._mixed else expected
                reference = _without_mean(reference) if centred else reference
                self._squares[1, index] += (everyone - reference).double().square().sum()
                self._squares[3, index] += reference.double().square().sum()
            self._squares[2, index] += expected.double().square().sum()
            if (held := self._held(index)) is not None:
                self._moe.drop(held)

    def _held(self, index: int) -> int | None:
        """Return the number that a layer has in the result; None: it is always in memory."""
        return index if self._parts is None else self._moe.layer_of(f"{self._parts.layer(index)}.")

    def _blocks(self, index: int) -> list[Module]:
        """Return the modules whose outputs add up to a layer's FFN in the result."""
        held = self._held(index)
        if self._parts is None:
            return self._moe.blocks(index)
        if held is not None:
            self._moe.load(held)
        return [self._moe.model.get_submodule(self._parts.block_of(index))]

    def _added(self, index: int, blocks: list[Module], x: torch.Tensor) -> torch.Tensor:
        """Return what the result's layer computes of an FFN's input."""
        family = self._job.family
        if family.module_paths.place(index).ends is None:
            return torch.stack([output_of(block, x) for block in blocks]).sum(0)
        # In a layer that was left dense, the modules are a projection, an activation, a projection.
        base = self._moe.model.base_model
        for path in family.replaced_modules(index):
            x = base.get_submodule(path)(x)
        return x

    def _mean_of_sources(self, index: int, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer if its router weighed all experts equally, from the sources' FFNs, one in memory.

        ``x`` is what they read; where the norm is folded into the experts, it is the mix's norm of what they read (``own``).
        """
        assert self._mixed is not None
        if self._job.target.folded(self._job.dense):
            norm = self._mixed.norm_before(index, self._job.recipe.dtype)
            x = (own - ConstantInput(x.shape[-1]).level) * norm["norm"].float()
            x = x + norm["norm_bias"].float() if "norm_bias" in norm else x
        job, total = self._job, torch.zeros_like(x)
        assert job.mixing is not None
        parts = [(source, 1 / len(job.members)) for source in job.members]
        for source, part in [*parts, *((source, 1.0) for source in job.shared_members)]:
            if source not in self._sources:
                self._sources[source] = layers_of(self._mixed.members[source], self._job.recipe.dtype, outside=False)
            layers = self._sources[source]
            layers.load(index)
            block = layers.model.get_submodule(job.family.module_paths.block_of(index))
            total += block(x) * (part * job.mixing.source_scale(source))
            layers.drop(index)
        return total

    @property
    def reference(self) -> str:
        """What a layer with all experts active is compared with, in words."""
        if not self._mixed:
            return "the dense FFN"
        return "the mean of the sources' FFNs" + (" and the shared ones" if self._job.shared_members else "")

    @property
    def relative(self) -> list[float]:
        """The relative error of every layer."""
        return [relative(error, norm) for error, norm in zip(*self._squares[[0, 2]].tolist(), strict=True)]

    @property
    def remark(self) -> str:
        """A remark that names the layers whose dense FFN adds nothing, where a relative error is 0 or infinite; else empty."""
        silent = [str(layer) for layer, norm in enumerate(self._squares[2].tolist()) if norm == 0]
        if not silent:
            return ""
        named = "layer " + silent[0] if len(silent) == 1 else f"{len(silent)} layers ({', '.join(silent[:8])}"
        return f"; the dense FFN of {named}{'' if len(silent) == 1 else ')'} adds nothing"

    @property
    def all_experts(self) -> float | None:
        """The largest relative error of a layer with all experts active; None: it is not measured."""
        if not self.all_experts_measured:
            return None
        errors, norms = self._squares[[1, 3]].tolist()
        found = [relative(errors[layer], norms[layer]) for layer in self._job.shape.moe_layers]
        return next((error for error in found if math.isnan(error)), max(found))


def _without_mean(output: torch.Tensor) -> torch.Tensor:
    """Return what is left of an output behind a LayerNorm, where the MoE adds no mean to the stream."""
    return output - output.mean(-1, keepdim=True)


def _down_bias(experts: Any, expert: int, x: torch.Tensor, own: int) -> torch.Tensor:
    """Return what an expert adds beside its own neurons: the dense FFN's down bias, as a bias or as neurons behind its ``own``."""
    bias: torch.Tensor | None = getattr(experts, "down_proj_bias", None)
    if bias is not None:
        return bias[expert]
    down = experts.down_proj[expert]
    if down.shape[1] <= own:
        return torch.zeros(x.shape[-1])
    gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return linear((experts.act_fn(gate) * up)[..., own:], down[:, own:])


def _all_experts(blocks: list[Module], x: torch.Tensor, job: ExpertJob) -> torch.Tensor:
    """Return the block's output with every expert active at equal weight, scaled so that it equals the dense FFN's.

    Neurons behind an expert's own, which hold a down bias, belong to no neuron of the dense FFN and are not scaled.
    """
    block, target = blocks[0], job.target
    experts, count = block.experts, job.shape.experts
    if isinstance(block, MoeBlock):
        return block.everyone(x, job.method.scale("exact", count, count) / (job.scale * count))
    each = target.weight_sum / count
    factor = each * job.method.scale("exact", count, count) / job.scale
    total = torch.zeros_like(x)
    for expert, output in enumerate(expert_outputs(experts, x.flatten(0, -2))):
        bias = _down_bias(experts, expert, x, job.shape.expert_size)
        total += factor * (output.view_as(x) - bias) + each * bias
    shared = getattr(block, target.shared, None) if target.shared else None
    if shared is not None:
        switch = torch.sigmoid(block.get_submodule(target.shared_switch)(x)) if target.shared_switch else 1
        total += shared(x) * switch
    for other in blocks[1:]:
        total += other(x)
    return total
