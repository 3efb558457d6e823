"""What the neurons of a stock dense model did in one forward pass. T tokens, F neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.architectures.module_paths import find_module_paths
from upcycle.errors import UsageError
from upcycle.trainers.routing.recorder import Recorder


@dataclass(frozen=True)
class ActivationRecord:
    """The gate branch of one FFN, ``[T, F]``, with gradients: ``before`` and ``after`` its activation function."""

    layer: int
    before: torch.Tensor
    after: torch.Tensor


def capture_activations(model: nn.Module) -> Recorder[ActivationRecord]:
    """Record the gate branch of every FFN of ``model``, a stock dense causal language model, from now on.

    Raises:
        UsageError: its class keeps the activation function where no hook reaches.
    """
    recorder: Recorder[ActivationRecord] = Recorder(model)
    for index, (block, name) in enumerate(_activations(model)):

        def read(inputs: tuple[Any, ...], output: torch.Tensor, layer: int = index) -> ActivationRecord:
            return ActivationRecord(layer, inputs[0].flatten(0, -2), output.flatten(0, -2))

        recorder.watch(getattr(block, name), read)
    return recorder


def replace_activations(model: Any, function: str = "relu") -> None:
    """Give every FFN of a dense model another activation function, in its configuration too (D2DMoE swaps in ReLU).

    Raises:
        UsageError: as :func:`capture_activations`, or transformers has no such function.
    """
    from transformers.activations import ACT2CLS, ACT2FN

    if function not in ACT2CLS:
        raise UsageError(f"unknown activation function '{function}'", hint=f"available: {', '.join(sorted(ACT2CLS))}")
    for block, name in _activations(model):
        setattr(block, name, ACT2FN[function])
    for key in ("hidden_act", "hidden_activation"):
        if getattr(model.config, key, None) is not None:
            setattr(model.config, key, function)


def _activations(model: Any) -> list[tuple[nn.Module, str]]:
    kind = model.config.model_type
    paths, found = find_module_paths(kind), []
    for index, layer in enumerate(paths.layers_in(model)):
        block: Any = getattr(layer, paths.block, None)
        names = [
            name
            for name in ("act_fn", "activation_fn", "activation")
            if isinstance(getattr(block, name, None), nn.Module)
        ]
        if not names:
            raise UsageError(
                f"layer {index} of this {kind} model has its activation function in code: it can be neither read nor replaced",
                hint="leave the hoyer loss out",
            )
        found.append((block, names[0]))
    return found
