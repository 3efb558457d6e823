"""Losses that teach routers what every expert would output for the inputs of the dense parent's FFNs.

B sequences, S positions, T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures.module_paths import module_paths_of
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.models.experts import expert_outputs, has_experts
from upcycle.trainers.checkpoints.write import CONVERSION
from upcycle.trainers.distributed.reduction import counted
from upcycle.trainers.recipe.part_recipes import ExpertTargetParameters
from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.routing_rule import widened
from upcycle.trainers.routing.stock_routers import MoeLayer, require_moe_layers

SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # names of shared experts in stock blocks


@dataclass(frozen=True)
class FfnRecord:
    """Inputs and outputs of one FFN of the dense parent in one pass, ``[B, S, D]`` both."""

    layer: int
    inputs: torch.Tensor
    outputs: torch.Tensor


def capture_ffns(parent: Any) -> Recorder[FfnRecord]:
    """Start recording the inputs and outputs of every FFN of a stock dense model.

    Raises:
        UsageError: the model is a MoE, or its layers have no FFN where they should.
    """
    kind = parent.config.model_type
    paths = module_paths_of(parent.config)
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
    """The factor by which a conversion multiplied its routed experts' outputs, from the record beside its weights.

    Args:
        folder: the converted model's, or a checkpoint of training it.

    Raises:
        UsageError: there is no record of it.
    """
    for place in (folder, folder / CONVERSION):
        if (place / "upcycle.json").is_file():
            scale = read_json(place / "upcycle.json").get("scale")
            if isinstance(scale, (int, float)):
                return float(scale)
    raise UsageError(
        f"distillation.expert_scale: {folder} does not record what its experts were multiplied by",
        hint="set it: to the number of routed experts for scale exact, to top-k for scale sum",
    )


def expert_target_losses(
    parameters: ExpertTargetParameters, model: Any, parent: Sequence[FfnRecord], mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weighted losses by name, means over the tokens of ``mask``; their gradients reach the routers alone.

    Both papers give every chosen expert the weight 1, while a stock router weighs them by its softmax. So logits are read in
    multiples of ``router_tolerance`` t: the papers' logits are ``z / t`` here, and the stock router's weights stay about equal.
    E_i is the part that the conversion cut out of the FFN: an expert's output divided by ``expert_scale``.

    - ``prior_approximate``: the loss of FactorLLM's code (arXiv 2408.11855): ``KL(p || q)`` with ``p`` the softmax of ``z / t``,
      and ``q`` that of 1 for the K experts with the least ``MSE(E_i(x), K/E FFN(x))`` and 0 for the others. With shared experts,
      which FactorLLM does not have, their output is subtracted from FFN(x). Summed over layers.
    - ``prior_balance``: FactorLLM's balance, ``mean(m * p)`` over experts, where m is 1 for the K largest p and else 0.
      Summed over layers.
    - ``output_norms``: D2DMoE (arXiv 2310.04361): the mean squared error of ``||E_i(x)||`` over experts and layers. A common
      offset of the logits changes nothing in a stock router, nor does their unit: the prediction is
      ``m + s (z_i - mean z) / t`` with m and s the mean and the deviation of the token's norms.

    Args:
        parameters: the losses' weights; ``expert_scale`` must be set.
        model: the stock MoE, with all experts on this rank.
        parent: records of the parent's FFNs in this pass.
        mask: bool ``[B, S]``, the tokens that count.
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
        errors, norms = expert_errors(layer, x, scale * k / layer.rule.experts * left_to_routed(layer, x, y))
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
    """``[T, D]``: the ``output`` of an FFN for ``x``, both ``[T, D]``, minus the output of the layer's shared experts."""
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
def expert_errors(layer: MoeLayer, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every expert's mean squared error from ``target`` ``[T, D]`` and its output's norm, for inputs ``[T, D]``; ``[T, E]`` each."""
    experts: Any = layer.experts
    errors, norms = [], []
    for output in map(widened, expert_outputs(experts, x)):
        errors.append((output - widened(target)).square().mean(-1))
        norms.append(output.norm(dim=-1))
    return torch.stack(errors, dim=-1), torch.stack(norms, dim=-1)


def _prior(logits: torch.Tensor, errors: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[T]``: ``KL(p || q)`` of the router's distribution from that of the nearest experts."""
    nearest = errors.topk(top_k, dim=-1, largest=False).indices
    label = torch.zeros_like(logits).scatter_(1, nearest, 1.0).log_softmax(-1)
    router = logits.log_softmax(-1)
    return (router.exp() * (router - label)).sum(-1)


def _chosen_probability(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[T]``: the sum of the K largest probabilities, divided by E."""
    return logits.softmax(-1).topk(top_k, dim=-1).values.sum(-1) / logits.shape[-1]


def _norm_error(logits: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """``[T]``: the squared error of the predicted norms, averaged over experts."""
    centred = norms - norms.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return (spread * (logits - logits.mean(-1, keepdim=True)) - centred).square().mean(-1)
