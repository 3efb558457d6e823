"""What the sparse blocks of stock transformers models consist of, and which of them are known here as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from upcycle.kernels.cpu.native.few_blocks import BlockRule
from upcycle.kernels.entry.transformers_experts import activation_name, why_not_experts
from upcycle.kernels.layout.plain_memory import is_subclass

# transformers' folder: how the names of its classes start. In all of them the router takes the K largest of a softmax; the scores are
# divided by their sum unless `norm_topk_prob` is false, and are rounded to the weights' dtype but in Mixtral.
_FAMILIES = {
    "flex_olmo": "FlexOlmo",
    "mellum": "Mellum",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_5_moe": "Qwen3_5Moe",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
}
_UNROUNDED = "Mixtral"

BlockParts = tuple[tuple[nn.Module, ...], tuple[torch.Tensor, ...]]


def block_parts(block: Any) -> BlockParts:
    """What a block consists of now: its modules, and its weights in the order of ``BlockWeights``.

    The modules are the router, the experts, their activation; the shared expert, its activation, its three projections and its
    switch. This is made for every token, and must not be kept: it would keep the weights alive.

    Raises:
        KeyError: a part is not where the class has it: it is computed, or has been replaced.
        AttributeError: it is no module.
    """
    inner = block._modules
    router, experts = inner["gate"], inner["experts"]
    routed = experts._parameters
    modules = (router, experts, experts._modules["act_fn"])
    weights = (router._parameters["weight"], routed["gate_up_proj"], routed["down_proj"])
    shared = inner.get("shared_expert")
    if shared is None:
        return modules, weights
    within, switch = shared._modules, inner["shared_expert_gate"]
    gate, up, down = within["gate_proj"], within["up_proj"], within["down_proj"]
    return (
        (*modules, shared, within["act_fn"], gate, up, down, switch),
        (
            *(*weights, gate._parameters["weight"], up._parameters["weight"]),
            *(down._parameters["weight"], switch._parameters["weight"]),
        ),
    )


def block_rule(block: Any) -> BlockRule:
    """What a block does, of which :func:`why_not_whole` knows no reason against it."""
    activation = activation_name(block.experts)
    assert activation is not None
    rounded = not type(block).__name__.startswith(_UNROUNDED)
    return BlockRule(block.gate.top_k, getattr(block.gate, "norm_topk_prob", True), rounded, activation)


def why_not_whole(block: Any) -> str | None:
    """The reason why a block is not one that is known here; ``None`` if it is."""
    folder = type(block).__module__.rpartition(".")[2].removeprefix("modeling_")
    stock, prefix = f"transformers.models.{folder}.modeling_{folder}", _FAMILIES.get(folder)
    if prefix is None or _class_of(block) != (stock, f"{prefix}SparseMoeBlock"):
        return "only its own code knows what its router does"
    try:
        modules, weights = block_parts(block)
    except (KeyError, AttributeError) as error:
        return f"it lacks the plain part {error}"
    router, experts, _, *shared = modules
    classes = [(router, "TopKRouter"), (experts, "Experts"), *((part, "MLP") for part in shared[:1])]
    strange = [part for part, name in classes if _class_of(part) != (stock, prefix + name)]
    strange += [part for part in shared[2:] if type(part) is not nn.Linear]
    foreign = [tensor for tensor in weights if is_subclass(tensor)]
    if strange:
        return "it has the class {1} of {0}".format(*_class_of(strange[0]))
    if foreign:
        return f"weights of the class {type(foreign[0]).__name__}"
    return _why_not_experts_of_it(experts, shared)


def _class_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _why_not_experts_of_it(experts: Any, shared: list[Any]) -> str | None:
    if not experts.has_gate or experts.has_bias or experts.is_transposed or not experts.is_concatenated:
        return "its experts are stored in another way"
    if experts._is_expert_parallel:
        return "its experts are divided among ranks"
    if any(linear._parameters["bias"] is not None for linear in shared[2:]):
        return "its shared expert has biases"
    if shared and type(shared[1]) is not type(experts.act_fn):
        return "its shared expert has an activation of its own"
    return why_not_experts(experts)
