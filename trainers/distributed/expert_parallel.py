"""Experts divided among ranks by DeepSpeed's AutoEP: which targets it can divide, and how its blocks map to stock ones.

E experts, F intermediate, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from upcycle.errors import UsageError

# model_type -> DeepSpeed's preset. Its "qwen3_moe" covers Qwen2-MoE, too: it knows both names of the shared expert.
AUTOEP_PRESETS = {
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_moe": "qwen3_moe",
}
_SIGMOID = (
    "DeepSpeed ignores biases on the choice of experts that are buffers, as they are here "
    "(github.com/deepspeedai/DeepSpeed/issues/8358), so the trained model would choose other experts than the exported one"
)
_REFUSED = {
    "glm4_moe": _SIGMOID,
    "deepseek_v3": _SIGMOID,
    "dots1": _SIGMOID,
    "solar_open": _SIGMOID,
    "lfm2_moe": _SIGMOID,
    "ernie4_5_moe": _SIGMOID,
    "qwen3_5_moe_text": "DeepSpeed has a preset for it, but training with it was not yet compared with training on one rank",
}
_UNKNOWN = "DeepSpeed has no preset for this architecture"


def check(model_type: str, experts: int, size: int, world_size: int) -> None:
    """Refuse models and sizes that AutoEP cannot divide.

    Args:
        model_type: of the MoE.
        experts: in each layer.
        size: ranks that are to share the experts of a layer.
        world_size: number of all ranks.

    Raises:
        UsageError: with the reason.
    """
    if model_type not in AUTOEP_PRESETS:
        raise UsageError(
            f"expert_parallel {size}: {_REFUSED.get(model_type, _UNKNOWN)} ({model_type})",
            hint=f"set expert_parallel to 1, or convert to one of {', '.join(AUTOEP_PRESETS)}",
        )
    if experts % size:
        raise UsageError(f"expert_parallel {size} does not divide {experts} experts", hint="choose a divisor of both")
    if world_size % size:
        raise UsageError(f"expert_parallel {size} does not divide {world_size} ranks", hint="choose a divisor of both")


def configuration(model_type: str, size: int) -> dict[str, Any]:
    """The ``expert_parallel`` section of DeepSpeed's configuration."""
    # On CPUs, experts run one after another: DeepSpeed's grouped product needs alignments there that small experts lack.
    return {
        "enabled": True,
        "autoep_size": size,
        "preset_model": AUTOEP_PRESETS[model_type],
        "use_grouped_mm": torch.cuda.is_available(),
    }


@contextmanager
def compatible_registry() -> Iterator[bool]:
    """Within this block, let DeepSpeed 0.19 read transformers' registry of recorded outputs; yields whether that needs help.

    DeepSpeed asks the registry for the name of a class, with a default, as it would ask a dictionary. Since 5.23, the registry's
    ``get`` takes the model itself. It is replaced while DeepSpeed starts by one that takes both, and put back afterwards.
    """
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:
        yield False
        return
    kind: Any = type(_CAN_RECORD_REGISTRY)
    if kind is dict or answers_by_name():
        yield False
        return
    original = kind.get

    def get(registry: Any, key: Any, default: Any = None) -> Any:
        return dict.get(registry, key, default) if isinstance(key, str) else original(registry, key)

    kind.get = get
    try:
        yield True
    finally:
        kind.get = original


def answers_by_name() -> bool:
    """Whether the registry of the installed transformers can be read in DeepSpeed 0.19's way."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    registry: Any = _CAN_RECORD_REGISTRY
    try:
        return registry.get("no such class", None) is None
    except (TypeError, AttributeError):
        return False


def is_parallel(block: nn.Module) -> bool:
    """Whether a MoE block is AutoEP's, in place of the stock one."""
    return bool(getattr(block, "_is_autoep_layer", False))


def read_router(block: nn.Module) -> Any:
    """A function that turns the output of AutoEP's router into ``(logits, weights, experts)``, as stock routers return them.

    The logits are not part of that output: a hook on the router's gate keeps them until then.
    """
    router: Any = block.router
    seen: dict[str, torch.Tensor] = {}
    router.gate.register_forward_hook(lambda _, __, logits: seen.update(logits=logits))

    def read(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, experts = output[:2]
        return seen.pop("logits"), weights, experts

    return read


def stock_names(prefix: str, router: str) -> dict[str, tuple[str, ...]]:
    """Stock name of each parameter of an AutoEP block at ``prefix`` -> names of the block's parameters that it consists of.

    ``gate_up_proj`` ``[E, 2F, D]`` is w1 and w3, ``[E, F, D]`` each, concatenated within every expert.

    Args:
        prefix: name of the block in the model.
        router: name of the router in the stock block.
    """
    return {
        f"{prefix}.{router}.weight": (f"{prefix}.router.gate.weight",),
        f"{prefix}.experts.gate_up_proj": (f"{prefix}.experts.w1", f"{prefix}.experts.w3"),
        f"{prefix}.experts.down_proj": (f"{prefix}.experts.w2",),
    }
