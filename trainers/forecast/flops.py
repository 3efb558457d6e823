"""Floating-point operations of training, and how many a device can do: utilisation is their ratio."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.adapters.live import adapter_of
from upcycle.architectures.module_paths import text_config
from upcycle.trainers.optimizing.parameter_groups import other_parts
from upcycle.trainers.routing.stock_routers import moe_layers


@dataclass(frozen=True)
class TrainingFlops:
    """Operations per token: of the forward pass, of the gradients of activations, and of the gradients of trained weights."""

    forward: float
    activations: float
    weights: float

    @property
    def total(self) -> float:
        """Their sum. What activation checkpointing or a survey computes again is not counted, as it is not progress."""
        return self.forward + self.activations + self.weights


def training_flops(model: Any, length: int) -> TrainingFlops:
    """The operations of training a model, per token (Kaplan et al., arXiv 2001.08361, section 2.1).

    Each of the three products takes two operations per weight that a token uses: K of E routed experts, and no embedding, which
    is only looked up; a tied head is a product. Causal attention over rows of ``length`` tokens takes half of all pairs. Gradients
    of activations are counted down to the first layer, although they are not needed below the lowest weight that trains.

    Args:
        model: a stock causal language model, with ``requires_grad`` set on what trains.
        length: tokens per row.
    """
    share: dict[int, float] = {}
    for layer in moe_layers(model):
        share |= {id(parameter): layer.rule.top_k / layer.rule.experts for parameter in layer.experts.parameters()}
    held = adapter_of(model)
    for name, pair in (held.pairs if held else {}).items():  # a token meets the pairs of its experts
        share |= {id(half): share.get(id(model.get_parameter(name)), 1.0) for half in pair.parameters()}
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    met = trained = 0.0
    other = {id(parameter) for _, parameter in other_parts(model)}  # which text does not meet
    for parameter in model.parameters():
        if id(parameter) not in other and parameter.dim() > 1 and (parameter is not embedding or tied):
            size = parameter.numel() * share.get(id(parameter), 1.0)
            met += size
            trained += size if parameter.requires_grad else 0.0
    attention = _attention(text_config(model.config), length)
    return TrainingFlops(2 * met + attention, 2 * met + 2 * attention, 2 * trained)


def _attention(config: Any, length: int) -> float:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return float(2 * layers * heads * width * length)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on ``device``: the best of a few within about a tenth of a second."""
    size = 8192 if device.type == "cuda" else 512
    # Random numbers, because GPUs multiply constants faster; from a generator of its own, to leave the run's as it is.
    left = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    best = 0.0
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.1 or not best:
        before = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - before))
    return best


def measured_bandwidth() -> float:
    """Bytes per second that a copy reads and writes on this machine: the best of a few within a tenth of a second."""
    left = torch.ones(1 << 24)
    right = torch.empty_like(left)
    best = 0.0
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.1 or not best:
        before = time.perf_counter()
        right.copy_(left)
        best = max(best, 2 * left.numel() * left.element_size() / (time.perf_counter() - before))
    return best
