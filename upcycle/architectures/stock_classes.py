"""Says what tensors a stock class holds, their shapes, and which stored tensors become them, from configurations and names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import build_config, empty_model

StateDict = dict[str, torch.Tensor]
# Buffers that transformers computes, and that old files hold: rotary frequencies, positions, causal masks.
_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)(position|token_type)_ids$", r"\.attn(\.attention)?\.(bias|masked_bias)$")


def stock_shapes(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the stored names and shapes of all tensors of a configuration's stock class; the head only where it is not tied."""
    settings = build_config(raw, "config.json")
    model = empty_model(settings, "config.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    paths = module_paths_of(settings)
    head = shapes.pop(f"{paths.head}.weight")
    return shapes if settings.tie_word_embeddings else {**shapes, paths.head_weight: head}


def stock_name_of(model: Any, stored: Iterable[str], only_renamed: bool = False) -> dict[str, str]:
    """Return, by stored name, the name of the weight that transformers makes of that tensor, alone or with others.

    With ``only_renamed``, tensors of which it makes something else than a copy are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    found = {name: rename_source_key(name, renamings, converters, prefix, own) for name in stored}
    return {name: target for name, (target, pattern) in found.items() if not only_renamed or pattern is None}


def rows_of_stock(model: Any, stored: Iterable[str]) -> dict[str, list[list[str]]] | None:
    """Return, by weight that transformers makes of several tensors, these: a list per row of the weight, whose tensors lie one
    after another in the row.

    That is how experts that are stored one by one become one weight. None: some rule of the class makes something else of tensors
    than to put them behind one another.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if pattern is not None and target in own:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    rows = {}
    for target, columns in found.items():
        rule = of_pattern[next(iter(columns))]
        stacked = [MergeModulelist] if len(columns) == 1 else [MergeModulelist, Concatenate]
        operations: list[Any] = list(rule.operations)
        if [type(operation) for operation in operations] != stacked:
            return None
        if any(operation.dim != at for at, operation in enumerate(operations)):
            return None
        ordered = [columns[pattern] for pattern in rule.source_patterns if pattern in columns]
        if len({len(column) for column in ordered}) != 1:
            return None
        rows[target] = [list(parts) for parts in zip(*ordered, strict=True)]
    return rows


def names_in_stock(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return the stored names by the names that transformers gives to their tensors when it loads them into a model.

    Tensors that the class leaves out when it loads, as it says, are not among them. One that it does not know, or that is one of
    several that become one weight, keeps its stored name.
    """
    names, found = stock_name_of(model, stored), set(model.state_dict())
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    buffers = not_loaded(model)
    return {
        (name if name in found and counts[name] == 1 else each): each
        for each, name in names.items()
        if name in found or not buffers.search(name)
    }


def not_loaded(model: Any) -> re.Pattern[str]:
    """Return what matches the names of tensors that a class leaves out when it loads, as it says, and of old files' buffers."""
    said = model._keys_to_ignore_on_load_unexpected or ()
    return re.compile("|".join(f"({pattern})" for pattern in (*said, *_BUFFERS)))


def may_be_missing(model: Any) -> re.Pattern[str]:
    """Return what matches the names of tensors that a class computes where files do not hold them, as it says: sinusoids, zeros."""
    said = model._keys_to_ignore_on_load_missing or ()
    return re.compile("|".join(f"({pattern})" for pattern in said) or r"(?!)")


def linear_layers(raw: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the paths of the linear layers inside the decoder layers of a configuration's stock class, with outputs and inputs."""
    settings = build_config(raw, "config.json")
    model, paths = empty_model(settings, "config.json"), module_paths_of(settings)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and paths.layer_of(f"{name}.weight") is not None
    }


def expert_leaves(raw: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the stored names of an expert's gate, up and down (``w1``, ``w3``, ``w2``) where files hold experts one by one.

    They are those of the rules by which transformers joins experts. None: it has no such rules for the class, and reads experts
    that are joined already.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found: dict[str, list[str]] = {}
    for rule in get_model_conversion_mapping(empty_model(build_config(raw, "config.json"), "config.json")):
        if isinstance(rule, WeightConverter) and len(rule.target_patterns) == 1:
            leaves = [
                re.fullmatch(r".*experts\W+\*?\W*(?:\w+\W+)?(\w+)\W+weight\W*", each) for each in rule.source_patterns
            ]
            if all(leaves):
                found[rule.target_patterns[0].rpartition(".")[2]] = [leaf[1] for leaf in leaves if leaf]
    if len(found.get("gate_up_proj", ())) != 2 or len(found.get("down_proj", ())) != 1:
        return None
    gate, up = found["gate_up_proj"]
    return gate, up, found["down_proj"][0]
