"""Losses that teach routers from what every expert would do with the dense parent's FFN inputs.

T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch.nn.functional import linear

from upcycle.errors import UsageError
from upcycle.methods.base import PluginParameters
from upcycle.registry import FAMILIES, load
from upcycle.trainers.losses import counted
from upcycle.trainers.recorder import Recorder
from upcycle.trainers.routing import MoeLayer, moe_layers, widened


class ExpertTargetParameters(PluginParameters):
    """How much routers are told of their experts."""

    prior_approximate: float = Field(
        0.0, ge=0, description="weight of FactorLLM's loss: choose the experts that come nearest to the parent's FFN"
    )
    output_norms: float = Field(
        0.0,
        ge=0,
        description="weight of D2DMoE's loss: logits are the norms of the experts' outputs, up to their scale",
    )


@dataclass(frozen=True)
class FfnRecord:
    """What one FFN of the dense parent was given and gave, ``[B, S, D]`` both."""

    layer: int
    inputs: torch.Tensor
    outputs: torch.Tensor


def capture_ffns(parent: Any) -> Recorder[FfnRecord]:
    """Record every FFN of a stock dense model from now on.

    Raises:
        UsageError: the model is of no dense family.
    """
    kind = parent.config.model_type
    if kind not in FAMILIES:
        raise UsageError(
            f"a {kind} model has no dense FFNs to learn from", hint="distil from the model that was converted"
        )
    recorder: Recorder[FfnRecord] = Recorder(parent)
    for index, layer in enumerate(parent.model.layers):
        block = getattr(layer, load("family", kind).block)
        recorder.watch(block, lambda inputs, output, index=index: FfnRecord(index, inputs[0], output))  # type: ignore[misc]
    return recorder


def expert_target_losses(
    parameters: ExpertTargetParameters, model: Any, parent: Sequence[FfnRecord], mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weighted losses, means over the tokens of ``mask`` (bool ``[B, S]``) and sums over layers; gradient reaches routers alone.

    - ``prior_approximate``: FactorLLM (arXiv 2408.11855) as its code has it: ``KL(p || q)`` with ``p`` the router's softmax, ``q``
      the softmax of 1 for the K experts of least squared error and 0 for others. Experts are compared with K times the
      parent's output: chosen ones weigh about 1/K each here, and FactorLLM's comparison differs by a common factor alone.
    - ``output_norms``: D2DMoE (arXiv 2310.04361) regresses ``||E_i(x)||``. A stock router's softmax does not see a common offset and
      needs no absolute numbers: both sides are compared per token less their mean, the norms over their own deviation.

    Args:
        parameters: the weights.
        model: the stock MoE, not divided.
        parent: its FFNs in this pass.
        mask: tokens that count.
    """
    records = {record.layer: record for record in parent}
    found: dict[str, list[torch.Tensor]] = {}
    count = mask.sum().clamp(min=1)
    for layer in moe_layers(model):
        record = records[layer.index]
        x = record.inputs.detach().flatten(0, -2)
        logits = widened(layer.router(x)[0])
        errors, norms = expert_outputs(layer, x, layer.rule.top_k * record.outputs.detach().flatten(0, -2))
        if parameters.prior_approximate:
            value = counted(_prior(logits, errors, layer.rule.top_k), mask) / count
            found.setdefault("prior_approximate", []).append(parameters.prior_approximate * value)
        if parameters.output_norms:
            value = counted(_norm_error(logits, norms), mask) / count
            found.setdefault("output_norms", []).append(parameters.output_norms * value)
    return {name: torch.stack(values).sum() for name, values in found.items()}


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
    nearest = errors.topk(top_k, dim=-1, largest=False).indices
    label = torch.zeros_like(logits).scatter_(1, nearest, 1.0).log_softmax(-1)
    own = logits.log_softmax(-1)
    return (own.exp() * (own - label)).sum(-1)


def _norm_error(logits: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    centred = norms - norms.mean(-1, keepdim=True)
    wanted = centred / centred.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(norms.dtype).tiny)
    return (logits - logits.mean(-1, keepdim=True) - wanted).square().mean(-1)
