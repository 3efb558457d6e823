"""The explicit list of every plug-in, loaded when it is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from upcycle.errors import UsageError

METHODS = {
    "sparse_upcycling": "upcycle.methods.sparse_upcycling:SparseUpcycling",
    "random_split": "upcycle.splitters.random_split:RandomSplit",
    "contiguous_split": "upcycle.splitters.contiguous_split:ContiguousSplit",
    "weight_kmeans": "upcycle.splitters.weight_kmeans:WeightKMeans",
    "coactivation_graph": "upcycle.splitters.coactivation_graph:CoactivationGraph",
    "coactivation_kmeans": "upcycle.splitters.coactivation_kmeans:CoactivationKMeans",
    "importance": "upcycle.splitters.importance:Importance",
    "cmoe": "upcycle.splitters.cmoe:CMoE",
    "factor": "upcycle.splitters.factor:Factor",
    "d2d": "upcycle.splitters.d2d:D2D",
    "alternating": "upcycle.splitters.alternating:Alternating",
}
ROUTERS = {
    "random": "upcycle.routers.random_rows:RandomRouter",
    "zero": "upcycle.routers.zero:ZeroRouter",
    "cool": "upcycle.routers.cool:CoolRouter",
    "centroid": "upcycle.routers.centroid:CentroidRouter",
    "ridge": "upcycle.routers.ridge:RidgeRouter",
    "representative": "upcycle.routers.representative:RepresentativeRouter",
    "distilled": "upcycle.routers.distilled:DistilledRouter",
}
FAMILIES = {
    "llama": "upcycle.families.llama:Llama",
    "mistral": "upcycle.families.mistral:Mistral",
    "qwen2": "upcycle.families.qwen2:Qwen2",
    "qwen3": "upcycle.families.qwen3:Qwen3",
}
TARGETS = {
    "mixtral": "upcycle.targets.mixtral:Mixtral",
    "qwen2_moe": "upcycle.targets.qwen2_moe:Qwen2Moe",
    "qwen3_moe": "upcycle.targets.qwen3_moe:Qwen3Moe",
}
KINDS = {"method": METHODS, "router": ROUTERS, "family": FAMILIES, "target": TARGETS}


def load(kind: str, name: str) -> Any:
    """Return the class registered as ``name`` among the plug-ins of ``kind``.

    Raises:
        UsageError: when nothing has that name; the hint suggests the nearest one.
    """
    names = KINDS[kind]
    if name not in names:
        raise UsageError(f"unknown {kind} '{name}'", hint=suggestion(name, names))
    module, _, attribute = names[name].partition(":")
    return getattr(import_module(module), attribute)


def suggestion(name: str, available: Any) -> str:
    """Say which of ``available`` the user may have meant, and list them all."""
    known = sorted(available)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean '{close[0]}'? " if close else ""
    return f"{meant}available: {', '.join(known)}"
