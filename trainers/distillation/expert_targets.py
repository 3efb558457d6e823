"""Losses that teach routers from what every expert would do with the dense parent's FFN inputs.

T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from upcycle.architectures.module_paths import find_module_paths
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.models.experts import has_experts
from upcycle.trainers.checkpoints.write import CONVERSION
from upcycle.trainers.distributed.reduction import counted
from upcycle.trainers.recipe.part_recipes import ExpertTargetParameters
from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.stock_routers import MoeLayer, require_moe_layers, widened

SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # what stock blocks call them


@dataclass(frozen=True)
class FfnRecord:
    """What one FFN of the dense parent was given and gave, ``[B, S, D]`` both."""

    layer: int
    inputs: torch.Tensor
    outputs: torch.Tensor


def capture_ffns(parent: Any) -> Recorder[FfnRecord]:
    """Record every FFN of a stock dense model from now on.

    Raises:
        UsageError: the model is a MoE, or its layers have no FFN where they should.
    """
    kind = parent.config.model_type
    paths = find_module_paths(kind)
    blocks = [block for layer in paths.layers_in(parent) for block in paths.blocks_in(layer)]
    if has_experts(parent) or len(blocks) != parent.config.num_hidden_layers:
        raise UsageError(
            f"a {kind} model has no dense FFNs to learn from", hint="distil from the model that was converted"
        )
    recorder: Recorder[FfnRecord] = Recorder(parent)
    for index, block in enumerate(blocks):
        recorder.watch(block, lambda inputs, output, index=index: FfnRecord(index, inputs[0], output))  # type: ignore[misc]
    return recorder


def recorded_scale(folder: Path) -> float:
    """What a conversion multiplied its routed experts' outputs by, from the record beside its weights.

    Raises:
        UsageError: there is no record.
    """
    for place in (folder, folder / CONVERSION):
        if (place / "upcycle.json").is_file():
            scale = read_json(place / "upcycle.json").get("scale")
            if isinstance(scale, (int, float)):
                return float(scale)
    raise UsageError(
        f"distillation.expert_scale: {folder} does not say what its experts were multiplied by",
        hint="give it: the number of routed experts for scale exact, top-k for scale sum",
    )


def expert_target_losses(
    parameters: ExpertTargetParameters, model: Any, parent: Sequence[FfnRecord], mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weighted losses, means over the tokens of ``mask`` (bool ``[B, S]``); gradient reaches routers alone.

    Both papers give chosen experts the weight one, and a stock router weighs them by its softmax. So logits are read in multiples
    of ``router_tolerance`` t: what the papers call logits is ``z / t`` here, and the weights stay about equal. E_i is what the
    conversion cut out of the FFN: an expert's output over ``expert_scale``.

    - ``prior_approximate``: FactorLLM (arXiv 2408.11855) as its code has it: ``KL(p || q)`` with ``p`` the softmax of ``z / t``,
      ``q`` that of 1 for the K experts of least ``MSE(E_i(x), K/E FFN(x))`` and 0 for others. Where there are shared experts,
      which FactorLLM does not have, FFN(x) is what they leave to the routed ones. Summed over layers.
    - ``prior_balance``: its balance, ``mean(mask * p)`` over experts with ``mask`` 1 for the K largest. Summed over layers.
    - ``output_norms``: D2DMoE (arXiv 2310.04361): the mean squared error of ``||E_i(x)||`` over experts and layers. A common
      offset of the logits changes nothing in a stock router, nor does their unit: the prediction is
      ``m + s (z_i - mean z) / t`` with m and s the mean and the deviation of the token's norms.

    Args:
        parameters: the weights; ``expert_scale`` must be known.
        model: the stock MoE, not divided.
        parent: its FFNs in this pass.
        mask: tokens that count.
    """
    scale, unit = parameters.expert_scale, parameters.router_tolerance
    assert scale
    records = {record.layer: record for record in parent}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in parameters.taught}
    count, layers = mask.sum().clamp(min=1), require_moe_layers(model)
    for layer in layers:
        record, k = records[layer.index], layer.rule.top_k
        x, y = (part.detach().flatten(0, -2) for part in (record.inputs, record.outputs))
        logits = widened(layer.router(x)[0]) / unit
        errors, norms = expert_outputs(layer, x, scale * k / layer.rule.experts * left_to_routed(layer, x, y))
        for name, of_layers in found.items():
            if name == "prior_approximate":
                value = _prior(logits, errors, k)
            elif name == "prior_balance":
                value = _chosen_probability(logits, k)
            else:
                value = _norm_error(logits, norms / scale) / len(layers)
            of_layers.append(getattr(parameters, name) * counted(value, mask) / count)
    return {name: torch.stack(of_layers).sum() for name, of_layers in found.items()}


@torch.no_grad()
def left_to_routed(layer: MoeLayer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """``[T, D]``: an FFN's ``output`` for ``x``, both ``[T, D]``, less what the layer's shared experts give."""
    block: Any = layer.block
    for name in SHARED:
        shared = getattr(block, name, None)
        if shared is not None:
            weight = block.shared_expert_gate(x).sigmoid() if hasattr(block, "shared_expert_gate") else 1.0
            output = output - weight * shared(x)
    for beside in layer.beside:
        output = output - beside(x)
    return output


@torch.no_grad()
def expert_outputs(layer: MoeLayer, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of every expert to a target, and the norm of its output, ``[T, E]`` both, for inputs ``[T, D]``."""
    experts: Any = layer.experts
    errors, norms = [], []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = linear(x, gate_up).chunk(2, dim=-1)
        output = widened(linear(experts.act_fn(gate) * up, down))
        errors.append((output - widened(target)).square().mean(-1))
        norms.append(output.norm(dim=-1))
    return torch.stack(errors, dim=-1), torch.stack(norms, dim=-1)


def _prior(logits: torch.Tensor, errors: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[T]``: KL of the router from the label."""
    nearest = errors.topk(top_k, dim=-1, largest=False).indices
    label = torch.zeros_like(logits).scatter_(1, nearest, 1.0).log_softmax(-1)
    own = logits.log_softmax(-1)
    return (own.exp() * (own - label)).sum(-1)


def _chosen_probability(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[T]``: the K largest probabilities, averaged over all experts."""
    return logits.softmax(-1).topk(top_k, dim=-1).values.sum(-1) / logits.shape[-1]


def _norm_error(logits: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """``[T]``: squared error of the norms, averaged over experts."""
    centred = norms - norms.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return (spread * (logits - logits.mean(-1, keepdim=True)) - centred).square().mean(-1)
