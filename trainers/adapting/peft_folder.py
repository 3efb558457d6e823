"""Writes the adapter of a run's checkpoint as PEFT stores it: ``adapter_config.json`` and ``adapter_model.safetensors``.

Peft itself, loading such a folder, computes what the model computed in the run; ``upcycle merge`` adds it to the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from upcycle.adapters.live import ADAPTER, adapter_of, parameter_of
from upcycle.checkpoints.tokenizer_files import copy_files
from upcycle.files import records
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.files.hashing import hash_file
from upcycle.files.local_names import without_paths
from upcycle.files.locate_adapted import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from upcycle.files.names import TRAINED
from upcycle.files.output.ownership import check_output
from upcycle.files.output.workspace import Workspace, explained_system_errors, sweep
from upcycle.progress import SILENT, Progress
from upcycle.trainers.adapting.targets import adaptable
from upcycle.trainers.checkpoints.read import SavedRun
from upcycle.trainers.recipe.adapter_recipe import AdapterRecipe

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."


def description(model: nn.Module, recipe: AdapterRecipe, base: str) -> dict[str, Any]:
    """What a checkpoint says of its adapter, so that it can be written without the model.

    Args:
        model: it has an adapter.
        recipe: the adapter's.
        base: the model that is trained, as the recipe names it.

    Returns:
        ``settings``: the content of ``adapter_config.json``; ``paths``: for each parameter that has a pair, the path that its
        matrices have in the file; ``whole``: the names of the parameters and buffers that the file holds whole.
    """
    held, kinds = adapter_of(model), adaptable(model)
    assert held is not None
    names = list(held.pairs)
    fused = [name for name in names if kinds[name] == "routed"]
    # Peft takes projections of these names in a MoE for those of its experts; named as parameters, they are what they are.
    sparse = any(kind in ("routed", "router") for kind in kinds.values())
    as_parameters = [name for name in names if sparse and kinds[name] != "attention"]
    whole = sorted({name.rpartition(".")[0] for name in held.whole})
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "r": recipe.rank,
        "lora_alpha": int(recipe.alpha) if recipe.alpha.is_integer() else recipe.alpha,
        "use_rslora": recipe.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": [name.removesuffix(".weight") for name in names if name not in as_parameters],
        "target_parameters": as_parameters or None,
        "modules_to_save": whole or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return {
        "settings": settings,
        "paths": {name: _path(name, fused, model) for name in names},
        "whole": [name for name in model.state_dict() if name.rpartition(".")[0] in whole],
    }


def write_peft_folder(saved: SavedRun, out: Path, overwrite: bool = False, progress: Progress = SILENT) -> Path:
    """Write the adapter of a checkpoint into the folder ``out``; returns it.

    Raises:
        UsageError: ``out`` is not empty.
        CheckpointError: a file of the checkpoint is damaged.
    """
    from safetensors.torch import save

    check_output(out, overwrite)
    saved.check_files()
    told = saved.state["adapter"]
    identity = hashlib.sha256(json.dumps([saved.state["files"], told], sort_keys=True).encode()).hexdigest()
    with (
        explained_system_errors(out),
        Workspace(out, identity, overwrite, kind="export", disposable=True, note=progress.note) as workspace,
    ):
        if not workspace.finished:
            folder = workspace.folder
            copy_files(saved.folder, folder, tokenizer=True)
            (folder / "generation_config.json").unlink(missing_ok=True)
            text = json.dumps(told["settings"], indent=2)
            (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
            content = save(dict(_tensors(saved, told)), metadata={"format": "pt"})
            (folder / ADAPTER_WEIGHTS).write_bytes(content)
            sweep(folder)
            _write_record(saved, folder)
        final: Path = workspace.publish()
    return final


def _tensors(saved: SavedRun, told: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Peft's names and tensors: A ``[E r, in]``, expert by expert, and B ``[out, r E]``, in which the experts' columns alternate."""
    files = [SafetensorsFile(saved.folder / name) for name in saved.state["files"]]
    held = {name: file for file in files for name in file.specs}
    for name, file in held.items():
        parameter = parameter_of(name)
        if ":" in name or parameter is None:
            continue
        value, half = file.read(name), name.rpartition(".")[2]
        if value.ndim == 3:
            value = value.flatten(0, 1) if half == "a" else value.permute(1, 2, 0).flatten(1)
        yield f"{_PREFIX}{told['paths'][parameter]}.lora_{half.upper()}.weight", value.contiguous()
    for name in told["whole"]:
        if name in held:
            yield f"{_PREFIX}{name}", held[name].read(name)


def _path(name: str, fused: Sequence[str], model: nn.Module) -> str:
    """The path of a pair's matrices: peft wraps the fused parameters of a module in their order, each around the one before."""
    path, _, own = name.rpartition(".")
    beside = [
        each for each, _ in model.get_submodule(path).named_parameters(recurse=False) if f"{path}.{each}" in fused
    ]
    depth = len(beside) - 1 - beside.index(own) if own in beside else 0
    return path + depth * ".base_layer"


def _write_record(saved: SavedRun, folder: Path) -> None:
    keys = ("tokens", "loss", "validation", "recipe", "versions")
    content = {"step": saved.step, **{key: without_paths(saved.state[key]) for key in keys}}
    files = {
        path.name: hash_file(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in (*records.UNHASHED, TRAINED)
    }
    (folder / TRAINED).write_text(
        json.dumps({**content, "kind": ADAPTER, "files": files}, indent=2) + "\n", encoding="utf-8"
    )
