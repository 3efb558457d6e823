"""Floating-point operations of training, and what a device can do: what utilisation is told from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.trainers.routing.stock_routers import moe_layers


@dataclass(frozen=True)
class TrainingFlops:
    """Operations per token: of the forward pass, of gradients of activations, and of gradients of what trains."""

    forward: float
    activations: float
    weights: float

    @property
    def total(self) -> float:
        """All of them. What activation checkpointing or a survey computes again is not counted: it is no progress."""
        return self.forward + self.activations + self.weights


def training_flops(model: Any, length: int) -> TrainingFlops:
    """Two operations per weight that a token meets, for each of the three products (Kaplan et al., arXiv 2001.08361, section 2.1),
    and causal attention over rows of ``length`` tokens: half of all pairs.

    A token meets K of E routed experts. Embeddings are looked up; a tied head is a product. Gradients of activations stop at
    the lowest thing that trains, which is not counted out here.

    Args:
        model: a stock causal language model; its ``requires_grad`` say what trains.
        length: tokens per row.
    """
    share: dict[int, float] = {}
    for layer in moe_layers(model):
        share |= {id(parameter): layer.rule.top_k / layer.rule.experts for parameter in layer.experts.parameters()}
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    met = trained = 0.0
    for parameter in model.parameters():
        if parameter.dim() > 1 and (parameter is not embedding or tied):
            size = parameter.numel() * share.get(id(parameter), 1.0)
            met += size
            trained += size if parameter.requires_grad else 0.0
    attention = _attention(model.config, length)
    return TrainingFlops(2 * met + attention, 2 * met + 2 * attention, 2 * trained)


def _attention(config: Any, length: int) -> float:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return float(2 * layers * heads * width * length)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product here: the best of a few, over about a tenth of a second."""
    size = 8192 if device.type == "cuda" else 512
    # Random, as GPUs compute products of constants faster; not from the generator that a run draws from.
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
    """Bytes per second that copying moves on this machine, read and written: the best of a few, over a tenth of a second."""
    left = torch.ones(1 << 24)
    right = torch.empty_like(left)
    best = 0.0
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.1 or not best:
        before = time.perf_counter()
        right.copy_(left)
        best = max(best, 2 * left.numel() * left.element_size() / (time.perf_counter() - before))
    return best
