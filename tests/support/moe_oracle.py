"""What a stock MoE does with text, asked of the whole model in fp64, without the code under test.

N windows of W tokens, T = N W, E experts, K per token, d the hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from any_moe import auto_class_of, text_of
from transformers import AutoConfig

SIGMOIDS = ("lfm2_moe", "glm4_moe", "dots1", "solar_open", "deepseek_v3", "glm4_moe_lite", "exaone_moe", "minimax_m2")


@dataclass
class Seen:
    """One layer with experts: ``outputs`` ``[T, E, d]`` are every expert's, ``before`` and ``after`` the stream around them."""

    x: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor  # [T, E], 0 where an expert was not chosen
    outputs: torch.Tensor
    routed: torch.Tensor
    block: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    bias: torch.Tensor
    arguments: tuple[Any, ...]


def stock(folder: Path, **changes: Any) -> Any:
    model = auto_class_of(folder).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", **changes)
    model.set_experts_implementation("eager")
    return model.eval()


def is_sigmoid(config: Any) -> bool:
    return config.model_type in SIGMOIDS or getattr(config, "expert_selection_fn", "") == "sigmoid"


def layers_of(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("layers"))


def block_of(layer: Any) -> Any:
    """The module that holds the experts; None in a dense layer."""
    return next((module for module in layer.modules() if "experts" in dict(module.named_children())), None)


def row_tensors(block: Any, experts: int) -> dict[str, torch.Tensor]:
    """The tensors of a block that count experts along their first dimension."""
    return {name: tensor for name, tensor in block.state_dict().items() if tensor.dim() and len(tensor) == experts}


def neurons(experts: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """The activations ``[t, F]`` of an expert."""
    if hasattr(
        experts, "gate_up_proj_bias"
    ):  # GPT-OSS: gate and up in turns, clamped, with a factor inside the sigmoid
        both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
        return torch.as_tensor(gate / (1 + torch.exp(-experts.alpha * gate)) * (up + 1))
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return torch.as_tensor(experts.act_fn(gate) * up)


def output_of(experts: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """The output ``[t, d]`` of an expert, before it is weighted."""
    down, active = experts.down_proj[expert], neurons(experts, x, expert)
    if hasattr(experts, "down_proj_bias"):
        return torch.as_tensor(active @ down + experts.down_proj_bias[expert])
    return torch.as_tensor(active @ down.T)


def watch(model: Any, windows: torch.Tensor) -> dict[int, Seen]:
    """Run the model, and say of every layer with experts what they did."""
    layers, found, made = layers_of(model), {}, {}
    handles = []

    def put(index: int, key: str) -> Any:
        return lambda _, given, output: made.setdefault(index, {}).update({key: (given, output)})

    def put_call(index: int) -> Any:
        return lambda _, given, named, output: made.setdefault(index, {}).update({"layer": (given, named, output)})

    for index, layer in enumerate(layers):
        if (block := block_of(layer)) is not None:
            handles.append(layer.register_forward_hook(put_call(index), with_kwargs=True))
            handles.append(block.register_forward_hook(put(index, "block")))
            handles.append(block.experts.register_forward_hook(put(index, "experts")))
            if getattr(layer, "shared_mlp", None) is not None:
                handles.append(layer.shared_mlp.register_forward_hook(put(index, "beside")))
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, parts in made.items():
        found[index] = _seen(layers[index], parts)
    return found


def _first(output: Any) -> torch.Tensor:
    return torch.as_tensor(output[0] if isinstance(output, tuple) else output)


def _seen(layer: Any, parts: dict[str, Any]) -> Seen:
    block = block_of(layer)
    (x, ids, weights, *_), routed = parts["experts"]
    x = x.reshape(-1, x.shape[-1])
    count, d = len(block.experts.down_proj), x.shape[1]
    rows = row_tensors(block, count)
    (router,) = [
        tensor for name, tensor in rows.items() if tensor.shape == (count, d) and not name.startswith("experts")
    ]
    bias = [tensor for name, tensor in block.state_dict().items() if tensor.numel() == count and "bias" in name]
    added = getattr(getattr(block, "router", None), "bias", None)  # to the logits, and not for the choice alone
    bias = [] if added is not None else bias
    spread = torch.zeros(len(x), count, dtype=torch.float64).scatter(1, ids, weights.double())
    with torch.no_grad():
        outputs = [output_of(block.experts, x, e) for e in range(count)]
        given, named, after = parts["layer"]
        # What the stream is without experts: the same layer with blocks that put out zeros.
        silent = [module for module in (block, getattr(layer, "shared_mlp", None)) if module is not None]
        handles = [module.register_forward_hook(lambda _, __, output: _zeros(output)) for module in silent]
        before = _first(layer(*given, **named))
        for handle in handles:
            handle.remove()
    sums = [_first(parts[key][1]).reshape(-1, d) for key in ("block", "beside") if key in parts]
    return Seen(
        x=x,
        logits=x @ router.double().T + (0 if added is None else added.detach().double()),
        ids=ids,
        weights=spread,
        outputs=torch.stack(outputs, 1).detach(),
        routed=_first(routed).reshape(-1, d),
        block=torch.stack(sums).sum(0),
        before=before.reshape(-1, d),
        after=_first(after).reshape(-1, d),
        bias=bias[0].double().flatten() if bias else torch.zeros(count, dtype=torch.float64),
        arguments=parts["block"][0],
    )


def _zeros(output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def without_experts(model: Any, folder: Path, kept: dict[int, Sequence[int]]) -> Any:
    """The same stock model with the experts of ``kept`` alone in each layer."""
    config = AutoConfig.from_pretrained(folder)
    own = text_of(config)
    key = next(key for key in EXPERTS_KEYS if isinstance(getattr(own, key, None), int))
    experts, left = getattr(own, key), len(next(iter(kept.values())))
    setattr(own, key, left)
    smaller = auto_class_of(folder).from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    smaller.set_experts_implementation("eager")
    state = model.state_dict()
    paths = {id(module): name for name, module in model.named_modules()}
    for index, layer in enumerate(layers_of(model)):
        if (block := block_of(layer)) is not None:
            for name, tensor in row_tensors(block, experts).items():
                state[f"{paths[id(block)]}.{name}"] = tensor[list(kept[index])]
            for name, tensor in block.state_dict().items():
                if tensor.shape == (1, experts):
                    state[f"{paths[id(block)]}.{name}"] = tensor[:, list(kept[index])]
    smaller.load_state_dict(state)
    return smaller


def some_windows(count: int = 6, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, (count, width), generator=torch.Generator().manual_seed(seed))
