"""The optimizer states of a dense training run, converted as its weights were to those of a MoE.

Sparse Upcycling (Komatsuzaki et al., arXiv 2212.05055, section 3) resumes the dense optimizer's states for vision models: an expert
that copies the dense FFN gets that FFN's moments, and the moments of routers, which are new, begin at zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures.moe.base import OutputTensor
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import CheckpointError, UsageError
from upcycle.ffn.blueprint import BlueprintFile, LayerBlueprint
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.locate import Source
from upcycle.files.records import BLUEPRINT_FILE, RECIPE_FILE
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import method_of
from upcycle.planning.prepare_experts import prepare_experts
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.trainers.checkpoints.prepare_model import stored_form
from upcycle.trainers.checkpoints.read import SavedRun, latest, open_checkpoint
from upcycle.trainers.checkpoints.whole_tensors import StockTensor, WholeTensors
from upcycle.trainers.checkpoints.write import STATE_FILE

_NEW = ("router", "shared_switch", "zeros", "filled")  # parts made without any dense weight: their states begin at zero
_HINT = "leave out dense_states: the optimizer then begins without states"


class DenseStates:
    """A dense run's optimizer states, for the parameters of a MoE that was converted from its result.

    Args:
        run: the dense run's folder, or one of its checkpoints.
        model: the folder that upcycle convert wrote.

    Raises:
        UsageError: the model is not a conversion with a blueprint, or its experts are not plain copies of dense neurons.
        CheckpointError: there is no checkpoint, or it is damaged.
    """

    def __init__(self, run: Path, model: Path) -> None:
        self.saved = _checkpoint(run)
        self.saved.check_files()
        self.model = model
        for name in (RECIPE_FILE, BLUEPRINT_FILE):
            if not (model / name).is_file():
                raise UsageError(
                    f"dense_states: {model} has no {name}, which records how its weights were made", hint=_HINT
                )
        recipe = parse_recipe(read_recipe(model / RECIPE_FILE), str(model / RECIPE_FILE))
        if recipe.sources:
            raise UsageError(f"dense_states: {model} is made of several models", hint=_HINT)
        self.dense = DenseCheckpoint(Source(str(run), self.saved.folder))
        method = method_of(recipe)
        if method.kind in ("growth", "pruning", "compression", "beside"):
            raise UsageError(f"dense_states: {recipe.method} makes no experts of a dense model", hint=_HINT)
        dense = self.dense
        job = prepare_experts(
            ExpertJob, recipe, method, dense.family, dense.config, dense.store.specs, dense.has_tokenizer
        )
        self.job = job
        self.blueprints = BlueprintFile(model / BLUEPRINT_FILE)
        self.copied = {entry.name: entry.origin for unit in job.units for entry in unit.entries if entry.origin}
        self.built: dict[str, tuple[int, OutputTensor]] = {}
        # A layer's tensors come one after another, with two states of each: what reads them is made once for all of them.
        self._experts = lru_cache(maxsize=2)(self._layer_experts)
        for layer in job.shape.moe_layers:
            _check_copies(self.blueprints.layer(layer), model)
            for tensor in job.target.moe_tensors(job.dense, job.shape, layer, "fused"):
                self.built[tensor.name] = (layer, tensor)
        files = [SafetensorsFile(self.saved.folder / name) for name in self.saved.state["files"]]
        self.files = {name: file for file in files for name in file.specs}

    def give(self, tensors: WholeTensors) -> None:
        """Give the states to an engine that has taken no step yet, after checking that its weights are the dense run's.

        Raises:
            UsageError: the MoE was not made from these weights, or not by copying them.
            CheckpointError: the dense run has no such states.
        """
        steps = int(self.saved.state["optimizer_steps"])
        trained = [tensor for tensor in tensors.stock_tensors if tensor.trained and tensor.exported]
        for tensor in trained:
            self._check_weights(tensors, tensor)
        if not steps:
            raise CheckpointError(f"{self.saved.folder} has no optimizer states", hint="name a later checkpoint")
        tensors.create_states(steps)
        for tensor in trained:
            for key in tensors.keys:
                tensors.set_state(tensor, key, self.converted(tensor.name, key).view(tensors.shape(tensor)))

    def converted(self, name: str, key: str = "") -> torch.Tensor:
        """A tensor in the shape of the MoE's ``name``, fp32, made from dense states as that tensor was made from dense weights.

        Args:
            name: of a parameter of the MoE.
            key: which state, such as ``exp_avg``; empty: the weights themselves.

        Raises:
            UsageError: the conversion has no such tensor, or computed it instead of copying.
            CheckpointError: the dense run has no such state.
        """
        if name in self.built:
            layer, tensor = self.built[name]
            experts = self._experts(layer, key)
            converted = []
            for part in tensor.parts:
                if part.kind.startswith(("idle", "shifted")) or (part.factor != 1 and part.kind not in _NEW):
                    raise _changed(name, self.model)
                value = experts.part(part)
                converted.append(torch.zeros_like(value) if part.kind in _NEW else value)
            return torch.cat([value.float() for value in converted]).view(tensor.shape)
        origin = self.copied.get(name)
        if origin is None:
            raise UsageError(f"dense_states: '{name}' is not a tensor of the conversion {self.model}", hint=_HINT)
        if origin.times != 1 or origin.centred or ((origin.add or origin.filled) and key):
            raise _changed(name, self.model)
        return self._of(key).whole(origin)

    def is_new(self, name: str) -> bool:
        """Whether a tensor has no dense weight in it."""
        return name in self.built and all(part.kind in _NEW for part in self.built[name][1].parts)

    def _check_weights(self, tensors: WholeTensors, tensor: StockTensor) -> None:
        if self.is_new(tensor.name):
            return
        weights = tensors.weights(tensor)
        # The export of the dense run, and the model that is trained now, each rounded the weights.
        dtypes = (stored_form(self.model)["dtype"], str(tensors.engine.module.dtype).removeprefix("torch."))
        wanted = self.converted(tensor.name).view(weights.shape)
        for dtype in dtypes:
            wanted = wanted.to(getattr(torch, dtype)).float()
        if not torch.equal(weights.cpu(), wanted):
            raise UsageError(
                f"dense_states: '{tensor.name}' of {self.model} was not made from the weights in {self.saved.folder}",
                hint="name the checkpoint whose export was converted, or leave out dense_states",
            )

    def _layer_experts(self, layer: int, key: str) -> ExpertTensors:
        return ExpertTensors(self._of(key).feed_forward(layer), self.blueprints.layer(layer))

    def _of(self, key: str) -> DenseCheckpoint:
        """The dense checkpoint with its states ``key`` in place of the weights of the same names."""
        checkpoint = copy(self.dense)
        checkpoint.store = _Store(self, f"{key}:" if key else "")
        return checkpoint


class _Store:
    """The tensors of a training checkpoint whose names begin with a prefix, under their names without it."""

    def __init__(self, states: DenseStates, prefix: str) -> None:
        self._states, self._files, self._prefix = states, states.files, prefix
        self.specs: dict[str, TensorSpec] = {
            name.removeprefix(prefix): file.specs[name]
            for name, file in states.files.items()
            if name.startswith(prefix) and (prefix or ":" not in name)
        }

    def _file(self, name: str) -> SafetensorsFile:
        if self._prefix + name not in self._files:
            raise CheckpointError(
                f"dense_states: {self._states.saved.folder} has no '{self._prefix}{name}'",
                hint="the dense run must train everything with the same optimizer",
            )
        return self._files[self._prefix + name]

    @property
    def fingerprint(self) -> str:
        return self._states.dense.store.fingerprint

    def sample(self) -> str:
        return hashlib.sha256("\n".join(self._file(name).sample() for name in self.specs).encode()).hexdigest()

    def location(self, name: str) -> str:
        return str(self._file(name).path)

    def read(self, name: str) -> torch.Tensor:
        return self._file(name).read(self._prefix + name)

    def chunks(self, name: str, most_bytes: int, part: Any = None, multiple: int = 1) -> Iterator[torch.Tensor]:
        return self._file(name).chunks(self._prefix + name, most_bytes, part, multiple)


def _checkpoint(run: Path) -> SavedRun:
    if (run / STATE_FILE).is_file():
        return open_checkpoint(run)
    saved = latest(run)
    if saved is None:
        raise CheckpointError(
            f"dense_states: {run} is not a training run with a checkpoint", hint="name RUN or RUN/checkpoints/step-..."
        )
    return saved


def _check_copies(blueprint: LayerBlueprint, model: Path) -> None:
    """Refuse experts that are not plain copies: a weight that was scaled, drawn or fitted has other moments than the dense one."""
    experts = (*blueprint.routed, *blueprint.shared)
    if blueprint.scale != 1 or blueprint.draws is not None or blueprint.down is not None:
        raise _changed(f"layer {blueprint.layer}", model)
    if any(not spec.plain or spec.scale != 1 for spec in experts):
        raise _changed(f"layer {blueprint.layer}", model)


def _changed(what: str, model: Path) -> UsageError:
    return UsageError(
        f"dense_states: {what} of {model} is not a plain copy or permutation of dense weights (scaled, re-initialised or fitted)",
        hint=_HINT,
    )
