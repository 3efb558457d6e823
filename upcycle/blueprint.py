"""What a method decides for one layer: which neurons each expert takes, how the experts are weighted, the router.

Blueprints are saved beside the output (``blueprint.safetensors``), so that a conversion can be inspected, plotted and
built again without its method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import CheckpointError

ZERO_NEURON = -1


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: int64 ``[m]`` neuron indices into the dense FFN; ``ZERO_NEURON`` stands for a neuron of zeros."""

    neurons: torch.Tensor


@dataclass(frozen=True)
class LayerBlueprint:
    """One MoE layer before its weights exist.

    ``scale`` multiplies the routed experts' down projection, for a router whose top-k weights sum to 1. ``router`` is
    fp32 ``[E, d]``; it is ``None`` until a router initialiser has filled it in. ``down`` ``[d, (S + E) * m]`` replaces the
    dense down projection where a refit changed it: one column per neuron of every expert, shared experts first.
    """

    layer: int
    routed: tuple[ExpertSpec, ...]
    top_k: int
    scale: float
    shared: tuple[ExpertSpec, ...] = ()
    router: torch.Tensor | None = field(default=None, compare=False)
    down: torch.Tensor | None = field(default=None, compare=False)

    @property
    def intermediate_size(self) -> int:
        """Neurons per expert."""
        return len(self.routed[0].neurons)

    @property
    def slots(self) -> torch.Tensor:
        """Int64 ``[(S + E) * m]``: the neurons of all experts, shared ones first; a neuron in two experts has two slots."""
        return torch.cat([expert.neurons for expert in self.shared + self.routed])


def save_blueprints(path: Path, blueprints: Mapping[int, LayerBlueprint], recipe: Mapping[str, Any]) -> None:
    """Write all layers: int32 ``layers.L.routed`` ``[E, m]``, ``layers.L.shared`` ``[S, m]``, fp32 ``layers.L.router``."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for layer, blueprint in blueprints.items():
        for kind, experts in (("routed", blueprint.routed), ("shared", blueprint.shared)):
            if experts:
                tensors[f"layers.{layer}.{kind}"] = torch.stack([e.neurons for e in experts]).to(torch.int32)
        if blueprint.router is not None:
            tensors[f"layers.{layer}.router"] = blueprint.router.float().contiguous()
    first = next(iter(blueprints.values()))
    header = {"top_k": first.top_k, "scale": first.scale, "recipe": dict(recipe)}
    path.write_bytes(save(tensors, metadata={"upcycle": json.dumps(header, sort_keys=True)}))


def blueprint_recipe(path: Path) -> dict[str, Any]:
    """The recipe a saved blueprint was made by, without its source.

    Raises:
        CheckpointError: the file is missing, damaged, or not a blueprint.
    """
    recipe: dict[str, Any] = _read(path)[0]["recipe"]
    return recipe


def load_blueprints(path: Path) -> dict[int, LayerBlueprint]:
    """Read what :func:`save_blueprints` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or not a blueprint.
    """
    header, tensors = _read(path)
    blueprints = {}
    for layer in sorted({int(name.split(".")[1]) for name in tensors}):
        experts = {
            kind: tuple(ExpertSpec(row.long()) for row in tensors.get(f"layers.{layer}.{kind}", ()))
            for kind in ("routed", "shared")
        }
        router = tensors.get(f"layers.{layer}.router")
        blueprints[layer] = LayerBlueprint(
            layer, top_k=header["top_k"], scale=header["scale"], router=router, **experts
        )
    return blueprints


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["upcycle"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", hint="a blueprint is written beside every conversion") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a blueprint: {error}") from None
    return header, tensors
