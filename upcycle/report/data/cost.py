"""Counts parameters, FLOPs and bytes of the model and of its dense parent."""

from __future__ import annotations

from typing import Any

from upcycle.files.records import BLUEPRINT_FILE
from upcycle.report.data.subject import Subject, missing

QUANTITIES = ("parameters", "active_parameters", "flops_per_token", "bytes")


def cost_data(subject: Subject) -> dict[str, Any]:
    """Return ``before`` and ``after``, which map :data:`QUANTITIES` to numbers, and ``names``, what the two are called.

    ``before`` is None where no dense parent is recorded. ``bytes`` after the conversion are those of the weight files as they
    are now, without the blueprint. FLOPs are two per active parameter outside the embedding; attention scores are not counted.

    Raises:
        CheckpointError: the folder is damaged.
    """
    if subject.config is None:
        return missing("the model is not complete")
    weights = (path for path in subject.folder.glob("*.safetensors") if path.name != BLUEPRINT_FILE)
    size = sum(path.stat().st_size for path in weights)
    if subject.record is None:
        return {"names": subject.sides, "before": None, "after": {**_from_headers(subject), "bytes": size}}
    plan = subject.record["plan"]
    before = (
        plan["parameters_dense"],
        plan["parameters_dense"]
        if plan["kind"] not in ("growth", "addition", "compression", "narrowing", "beside")
        else None,
        plan["flops_per_token_dense"],
        plan["bytes_dense"],
    )
    after = (plan["parameters_total"], plan["parameters_active"], plan["flops_per_token"], size)
    return {
        "names": subject.sides,
        "before": dict(zip(QUANTITIES, before, strict=True)),
        "after": dict(zip(QUANTITIES, after, strict=True)),
    }


def _from_headers(subject: Subject) -> dict[str, int]:
    total = sum(spec.elements for spec in subject.specs.values())
    moe = subject.moe
    idle = moe.expert_elements * (moe.experts - moe.top_k) // moe.experts if moe else 0
    config = subject.text_config
    embedding = 0 if config.get("tie_word_embeddings") else config.get("vocab_size", 0) * config.get("hidden_size", 0)
    return {"parameters": total, "active_parameters": total - idle, "flops_per_token": 2 * (total - idle - embedding)}
