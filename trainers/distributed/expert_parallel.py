"""Experts divided among ranks by DeepSpeed's AutoEP: for which targets, and how its layers are read.

E experts, F intermediate, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from upcycle.errors import UsageError

# model_type -> DeepSpeed's preset. Its "qwen3_moe" covers Qwen2-MoE, of which shared experts it knows both names.
PRESETS = {
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_moe": "qwen3_moe",
}
_SIGMOID = (
    "DeepSpeed leaves out biases on the choice of experts that are buffers, as they are here "
    "(github.com/deepspeedai/DeepSpeed/issues/8358), so the trained model would choose other experts than the exported one"
)
_REFUSED = {
    "glm4_moe": _SIGMOID,
    "dots1": _SIGMOID,
    "solar_open": _SIGMOID,
    "lfm2_moe": _SIGMOID,
    "ernie4_5_moe": _SIGMOID,
    "qwen3_5_moe_text": "DeepSpeed has a preset for it, whose curve was not yet compared with that of one rank",
}
_UNKNOWN = "DeepSpeed has no preset for this architecture"


def check(model_type: str, experts: int, size: int, world_size: int) -> None:
    """Refuse what AutoEP cannot divide.

    Raises:
        UsageError: with the reason.
    """
    if model_type not in PRESETS:
        raise UsageError(
            f"expert_parallel {size}: {_REFUSED.get(model_type, _UNKNOWN)} ({model_type})",
            hint=f"set expert_parallel to 1, or convert to one of {', '.join(PRESETS)}",
        )
    if experts % size:
        raise UsageError(f"expert_parallel {size} does not divide {experts} experts", hint="choose a divisor of both")
    if world_size % size:
        raise UsageError(f"expert_parallel {size} does not divide {world_size} ranks", hint="choose a divisor of both")


def configuration(model_type: str, size: int) -> dict[str, Any]:
    """DeepSpeed's ``expert_parallel`` section."""
    # Experts run one after another on CPUs: there DeepSpeed's grouped product needs alignments that small ones lack.
    return {
        "enabled": True,
        "autoep_size": size,
        "preset_model": PRESETS[model_type],
        "use_grouped_mm": torch.cuda.is_available(),
    }


@contextmanager
def compatible_registry() -> Iterator[bool]:
    """Let DeepSpeed look up what transformers records of a model, whichever of both is newer; yields whether that was needed.

    DeepSpeed 0.19 asks the registry by the name of a class, with a default, as a dictionary; since 5.23 transformers'
    registry takes the model itself. Inside, it takes both.
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
    own = kind.get

    def get(registry: Any, key: Any, default: Any = None) -> Any:
        return dict.get(registry, key, default) if isinstance(key, str) else own(registry, key)

    kind.get = get
    try:
        yield True
    finally:
        kind.get = own


def answers_by_name() -> bool:
    """Whether the installed transformers' registry can be asked as DeepSpeed 0.19 asks it."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    registry: Any = _CAN_RECORD_REGISTRY
    try:
        return registry.get("no such class", None) is None
    except (TypeError, AttributeError):
        return False


def is_parallel(block: nn.Module) -> bool:
    """Whether a MoE block is one of AutoEP's."""
    return bool(getattr(block, "_is_autoep_layer", False))


def read_router(block: nn.Module) -> Any:
    """A function that makes ``(logits, weights, experts)``, as stock routers give them, of the output of AutoEP's router."""
    router: Any = block.router
    seen: dict[str, torch.Tensor] = {}
    router.gate.register_forward_hook(lambda _, __, logits: seen.update(logits=logits))

    def read(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, experts = output[:2]
        return seen.pop("logits"), weights, experts

    return read


def stock_names(prefix: str, router: str) -> dict[str, tuple[str, ...]]:
    """The stock names of an AutoEP block's own parameters below ``prefix``, and which of its make each up.

    ``gate_up_proj`` ``[E, 2F, D]`` is w1 and w3 ``[E, F, D]`` of every expert one behind the other.
    """
    return {
        f"{prefix}.{router}.weight": (f"{prefix}.router.gate.weight",),
        f"{prefix}.experts.gate_up_proj": (f"{prefix}.experts.w1", f"{prefix}.experts.w3"),
        f"{prefix}.experts.down_proj": (f"{prefix}.experts.w2",),
    }
