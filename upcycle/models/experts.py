"""Tells whether a stock model has experts, and chooses how they are computed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from upcycle.architectures.module_paths import module_paths_of, text_config
from upcycle.errors import UsageError
from upcycle.models.own.configuration import UpcycleMoeConfig
from upcycle.models.own.factored_experts import FactoredExperts
from upcycle.models.own.moe_block import PackedExperts
from upcycle.registry import find, suggestion

_ALIGNMENT = 16  # bytes: transformers' grouped products need rows of a multiple of this size


def has_experts(model: Any) -> bool:
    """Return whether a model is a MoE, whatever its router: every stock class names the module of its experts ``experts``."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def use_experts(model: Any, name: str, device: str | None = None) -> None:
    """Choose how a MoE model computes its experts; a dense one stays as it is.

    ``eager`` runs experts one after another, whatever their widths. ``auto`` is ``upcycle`` (:mod:`upcycle.kernels`) on CPUs and
    on GPUs that its Triton kernels run on; elsewhere, a grouped product where the experts' widths allow that.

    Args:
        model: a stock causal language model.
        name: transformers' implementation of experts, or ``auto``.
        device: type of the devices that it will run on; default: the one that it is on.

    Raises:
        UsageError: transformers has no such implementation.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name != "eager":  # converting a model must not wait for kernels to be imported
        from upcycle.kernels.entry.transformers_experts import register_kernels

        register_kernels()
    known = ["auto", "eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if name not in known:
        raise UsageError(f"experts: transformers has no '{name}'", hint=suggestion(name, known))
    if not has_experts(model) or not hasattr(model, "set_experts_implementation"):
        return
    if isinstance(model.config, UpcycleMoeConfig):
        model.set_experts_implementation("eager" if name == "eager" else "upcycle")
        return
    if name == "auto" and find("target", text_config(model.config).model_type) is None:
        return  # the kernels were tested on the targets alone: other architectures keep transformers' own computation
    # A plan knows only the type of its devices: its GPUs are assumed to run the kernels.
    if name == "auto" and (device in ("cpu", "cuda") if device else _has_kernels(model.device)):
        from upcycle.kernels.entry.choose_backend import NAME

        name = NAME
    elif name == "auto":
        weights = [parameter for key, parameter in model.named_parameters() if ".experts." in key]
        size = min((parameter.element_size() for parameter in weights), default=4)
        aligned = all(width * size % _ALIGNMENT == 0 for parameter in weights for width in parameter.shape[1:])
        name = "grouped_mm" if aligned else "eager"
    parts = find("wrapper", model.config.model_type)  # whose own class has no experts, and so no choice
    holder = model if parts is None else model.get_submodule(module_paths_of(model.config).body)
    try:
        holder.set_experts_implementation(name)
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"experts: {model.config.model_type} cannot have '{name}': {error}", hint="experts: auto"
        ) from None


def use_eager_experts(model: Any) -> Any:
    """Return the same model with experts that run one after another: transformers' default, grouped_mm, refuses narrow ones."""
    use_experts(model, "eager")
    return model


def expert_outputs(experts: Any, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the output ``[T, d]`` of every routed expert for inputs ``[T, d]``, biases included, by the stock class's own code."""
    own = inspect.unwrap(type(experts).forward)
    count = experts.count if isinstance(experts, PackedExperts | FactoredExperts) else len(experts.down_proj)
    for expert in range(count):
        chosen = torch.full((len(x), 1), expert, device=x.device)
        yield own(experts, x, chosen, torch.ones_like(chosen, dtype=x.dtype))


def run_on_kernels(model: Any) -> str | None:
    """Let a MoE run on :mod:`upcycle.kernels`, sparse blocks as a whole where they are known; return what it runs on.

    That is ``upcycle, whole blocks``, ``upcycle`` for the experts alone, the implementation that the model has already where the
    kernels do not know its architecture or its device, and None for a dense model.

    Args:
        model: a stock causal language model, on the device that it will run on.
    """
    if not has_experts(model):
        return None
    if isinstance(model.config, UpcycleMoeConfig):
        use_experts(model, "auto")
        return "upcycle"
    if find("target", text_config(model.config).model_type) is None or not _has_kernels(model.device):
        return str(text_config(model.config)._experts_implementation)
    from upcycle.kernels.entry.stock_blocks import why_not_whole
    from upcycle.kernels.entry.transformers_blocks import use_kernels

    use_experts(model, "auto")
    if all(why_not_whole(block) for block in model.modules() if "experts" in block._modules):
        return str(text_config(model.config)._experts_implementation)
    use_kernels(model)
    return f"{text_config(model.config)._experts_implementation}, whole blocks"


def _has_kernels(device: torch.device) -> bool:
    from upcycle.kernels.layout.devices import why_not

    return device.type == "cpu" or why_not(device) is None
