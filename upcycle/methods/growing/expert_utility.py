"""Measures how useful each expert of a Mixture-of-Experts is: by its weights, by how often it is chosen, or by gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import load_stock_model
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import EnvironmentFault
from upcycle.hardware.memory import available_memory
from upcycle.models.experts import use_eager_experts
from upcycle.progress import Progress
from upcycle.trainers.routing.router_load import load_counts

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

Utility = dict[int, np.ndarray]  # layer -> fp64 [E]


def expert_utility(
    checkpoint: MoeCheckpoint, utility: str, windows: torch.Tensor | None, progress: Progress
) -> Utility:
    """Return the utility of every expert: layer -> fp64 ``[E]``.

    - ``norm``: the Frobenius norm of all its weights, read expert by expert.
    - ``load``: the number of tokens of ``windows`` that choose it.
    - ``saliency`` and ``gradient``: the sums over its weights of ``|w g|`` and ``g^2``, where ``g`` is the gradient of the mean
      next-token loss of all windows.

    All but ``norm`` hold the model in memory in fp32; the last two also hold the gradients of all experts.

    Args:
        checkpoint: the MoE.
        utility: one of the four names above.
        windows: the text, token ids ``[N, W]``; None for ``norm``.
        progress: where to report.

    Raises:
        EnvironmentFault: there is not enough memory.
    """
    if utility == "norm":
        return _norms(checkpoint, progress)
    assert windows is not None
    _check_memory(checkpoint.model, windows.shape[1], gradients=utility != "load")
    model: Any = use_eager_experts(load_stock_model(checkpoint.source.path).eval().requires_grad_(False))
    return _load(model, windows, progress) if utility == "load" else _from_gradients(model, windows, utility, progress)


def needed_memory(model: MoeModel, window: int, gradients: bool) -> int:
    """Return the bytes that running the model takes: weights in fp32, the experts' gradients, one window's activations."""
    total = sum(spec.elements for spec in model.specs.values())
    logits = window * model.vocab_size
    if not gradients:
        return 4 * (total + 3 * logits)
    width = model.expert_elements // (3 * model.hidden_size * model.experts * max(1, len(model.moe_layers)))
    tokens = window * model.layers * (16 * model.hidden_size + 6 * model.top_k * width)
    return 4 * (total + model.expert_elements + 5 * logits + tokens)


def _check_memory(model: MoeModel, window: int, gradients: bool) -> None:
    needed, free = needed_memory(model, window, gradients), available_memory()
    if needed > free:
        raise EnvironmentFault(
            f"the utility of experts is measured with the model in memory: about {needed / 1e9:.1f} GB in fp32, and "
            f"{free / 1e9:.1f} GB are free",
            hint="--param utility=norm looks at the weights alone" + (", load needs no gradients" if gradients else ""),
        )


def _norms(checkpoint: MoeCheckpoint, progress: Progress) -> Utility:
    model = checkpoint.model
    squares = {layer: np.zeros(model.experts) for layer in model.moe_layers}
    with progress.phase("measuring experts", len(squares)):
        for layer, found in squares.items():
            for expert, origin in model.expert_origins(layer):
                found[expert] += sum(block.double().square().sum().item() for block in checkpoint.blocks(origin))
            progress.advance()
    return {layer: np.sqrt(found) for layer, found in squares.items()}


def _load(model: Any, windows: torch.Tensor, progress: Progress) -> Utility:
    with load_counts(model) as counts, torch.no_grad():
        for ids in _one_by_one(windows, progress):
            model(ids, use_cache=False, logits_to_keep=1)  # the logits themselves are not needed
    return {layer: count.double().numpy() for layer, count in counts.items()}


def _one_by_one(windows: torch.Tensor, progress: Progress) -> Iterator[torch.Tensor]:
    with progress.phase("measuring experts", len(windows)):
        for ids in windows.split(1):
            yield ids
            progress.advance()


def _from_gradients(model: Any, windows: torch.Tensor, utility: str, progress: Progress) -> Utility:
    layers = module_paths_of(model.config).layers_in(model)
    experts = {i: found for i, layer in enumerate(layers) if (found := _taken_apart(layer))}
    predicted = len(windows) * (windows.shape[1] - 1)
    for ids in _one_by_one(windows, progress):
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / predicted
        loss.backward()
    return {layer: np.array([_effect(own, utility) for own in found]) for layer, found in experts.items()}


_TENSORS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def _taken_apart(layer: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Return the matrices of every expert of a layer, each as a leaf tensor of its own in the same memory.

    The gradient of a slice is as large as the whole tensor: one per expert would take E times the memory of all experts.
    """
    apart: list[tuple[torch.nn.Parameter, ...]] = []
    for module in [module for name, module in layer.named_modules() if name.endswith(".experts")]:
        for name in [name for name in _TENSORS if hasattr(module, name)]:
            rows = [torch.nn.Parameter(row) for row in getattr(module, name).detach().unbind()]
            delattr(module, name)
            setattr(module, name, torch.nn.ParameterList(rows))
            apart.append(tuple(rows))
    return [list(own) for own in zip(*apart, strict=True)]


def _effect(matrices: list[torch.nn.Parameter], utility: str) -> float:
    """Return the sum of a utility over an expert's weights; an expert that was never chosen has no gradient, and counts 0."""
    total = 0.0
    for weight in matrices:
        if weight.grad is not None:
            each = weight.grad.square() if utility == "gradient" else (weight.detach() * weight.grad).abs()
            total += each.double().sum().item()
    return total
