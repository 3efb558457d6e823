"""Tells which layers are dense, and how many shared and routed experts the other layers have."""

from __future__ import annotations

import re
from typing import Any

from upcycle.ffn.blueprint import BlueprintFile
from upcycle.files import records
from upcycle.report.data.subject import Subject

_SHARED_DOWN = re.compile(r".*shared.*(down_proj|output_linear)\.weight")
_EXPERT_DOWN = re.compile(r".+experts(\.\d+)?\.(down_proj|w2)(\.weight)?|.+block_sparse_moe\.output_linear\.weight")


def layer_structure(subject: Subject) -> list[dict[str, Any]]:
    """Return an entry per layer: ``kind`` (dense or moe), ``shared`` and ``routed`` experts, ``top_k``, ``neurons`` of an expert.

    For a model that upcycle did not convert, all shared experts count as one, with ``shared_neurons``.

    Raises:
        CheckpointError: the folder is damaged.
    """
    config, moe = subject.text_config, subject.moe
    blueprint = subject.folder / records.BLUEPRINT_FILE
    decided = BlueprintFile(blueprint) if subject.ours and blueprint.is_file() else None
    layers = []
    count = (subject.record or {}).get("layers") or config.get("num_hidden_layers", 0)
    for layer in range(count):
        routed, shared, neurons = decided.shape(layer) if decided and layer in decided.layers else (0, 0, 0)
        if layer not in subject.moe_layers if moe else not routed:
            layers.append(_entry(layer, "dense", 0, 0, 0, neurons or config.get("intermediate_size", 0), 0))
        elif neurons:
            top_k = moe.top_k if moe else config.get("num_experts_per_tok", 0)
            layers.append(_entry(layer, "moe", shared, routed, top_k, neurons, shared * neurons))
        elif moe:
            wide = _shared_neurons(subject, layer)
            neurons = _expert_neurons(subject, layer)
            layers.append(_entry(layer, "moe", int(wide > 0), moe.experts, moe.top_k, neurons, wide))
    return layers


def _entry(layer: int, kind: str, shared: int, routed: int, top_k: int, neurons: int, wide: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "kind": kind,
        "shared": shared,
        "routed": routed,
        "top_k": top_k,
        "neurons": neurons,
        "shared_neurons": wide,
    }


def _shared_neurons(subject: Subject, layer: int) -> int:
    found = (spec.shape[1] for name, spec in subject.specs.items() if _is(_SHARED_DOWN, name, subject, layer))
    return next(found, 0)


def _expert_neurons(subject: Subject, layer: int) -> int:
    found = (spec.shape[-1] for name, spec in subject.specs.items() if _is(_EXPERT_DOWN, name, subject, layer))
    return next(found, 0)


def _is(pattern: re.Pattern[str], name: str, subject: Subject, layer: int) -> bool:
    inside = subject.moe is not None and subject.moe.module_paths.layer_of(name) == layer
    return inside and bool(pattern.fullmatch(name))
