"""Reads a model's weights with stock transformers, one decoder layer at a time.

A verification must not read its reference with the code that it judges. So transformers' own loading code alone decides here
which stored tensor becomes which weight, what is renamed, split or fused on the way, and what is tied. Upcycle's families and
targets are asked one thing: which module of the stock class holds the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from upcycle.architectures.clean_settings import clean_file
from upcycle.architectures.module_paths import ModulePaths, module_paths_in
from upcycle.architectures.stock import build_config, empty_model, load_stock_model, quiet_transformers
from upcycle.architectures.stock_classes import may_be_missing, not_loaded, stock_name_of
from upcycle.errors import CheckpointError
from upcycle.files.formats.block_fp8 import BlockFp8Folder
from upcycle.files.formats.packed_folder import tensors_of
from upcycle.files.formats.tensor_files import read_config
from upcycle.models.first_calls import settle_code_paths

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint

Rounding = Callable[[str, torch.Tensor], torch.Tensor]


class Layers(Protocol):
    """A stock model whose decoder layers are loaded and dropped one by one; weights outside the layers stay loaded."""

    model: Any

    def load(self, index: int) -> None:
        """Give layer ``index`` its weights, in fp32."""

    def drop(self, index: int) -> None:
        """Free the weights of layer ``index``."""


class FolderLayers:
    """Reads the layers of a transformers folder.

    Args:
        folder: the folder of a dense model or a MoE, with safetensors weights.
        rounding: rounds a weight that was read, given its name and value.
        outside: whether to read the weights outside the layers, too.
        left_out: tells by its name in the stock class whether a weight is left on the meta device.
        dtype: of the weights in memory.

    Attributes:
        model: the stock model, without the weights that are not loaded.
        unexpected: stored names that the stock class has no weight for: of further layers, and of what was read so far.

    Raises:
        CheckpointError: the stock class misses a weight, or finds one of another shape.
    """

    def __init__(
        self,
        folder: Path,
        rounding: Rounding | None = None,
        outside: bool = True,
        left_out: Callable[[str], bool] = lambda name: False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._folder, self._rounding, self._left_out, self._dtype = folder, rounding, left_out, dtype
        self._store = tensors_of(folder, read_config(folder))
        settings = build_config(clean_file(folder / "config.json"), str(folder))
        self.model: Any = empty_model(settings, str(folder), dtype).eval()
        self._stored = _by_layer(self.model, self._store.specs, left_out)
        beyond = [name for index, names in self._stored.items() if (index or 0) >= len(self) for name in names]
        self.unexpected = self._surplus(beyond)
        compute_buffers(self.model)
        if outside:
            self.load_outside()

    def load_outside(self) -> None:
        """Give the weights outside the layers (embeddings, last norm, head) their values, if that was not done at once."""
        missing = self._read(None)
        _compute_missing(self.model)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        empty = [name for name, weight in weights_of(self.model, None) if weight.is_meta and not self._left_out(name)]
        if empty:
            raise CheckpointError(f"{self._folder}: stock transformers finds no weight for '{empty[0]}'")

    def __len__(self) -> int:
        return len(_layers(self.model))

    def load(self, index: int) -> None:
        """Give layer ``index`` its weights."""
        self._read(index)
        compute_layer_buffers(self.model, index)
        empty = [n for n, weight in weights_of(self.model, index) if weight.is_meta and not self._left_out(n)]
        if empty:
            raise CheckpointError(f"{self._folder}: stock transformers finds no weight for '{empty[0]}'")

    def drop(self, index: int) -> None:
        """See :class:`Layers`."""
        _layers(self.model)[index].to("meta")

    def _read(self, index: int | None) -> set[str]:
        """Pass a layer's tensors, or (None) those outside the layers, to transformers; return the weights still missing."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        tensors = {name: self._tensor(name) for name in self._stored.get(index, ())}
        mapping: Any = get_model_conversion_mapping(self.model)
        plan = self.model._get_dtype_plan(self._dtype)
        wanted = LoadStateDictConfig(dtype=self._dtype, dtype_plan=plan, weight_mapping=mapping, use_safetensors=True)
        with quiet_transformers():
            report, _ = convert_and_load_state_dict_in_model(self.model, tensors, wanted)
        if problems := [*report.mismatched_keys, *report.conversion_errors]:
            raise CheckpointError(f"{self._folder}: stock transformers cannot use a weight: {problems[0]}")
        round_weights(self.model, index, self._rounding)
        self.unexpected |= self._surplus(report.unexpected_keys)
        return set(report.missing_keys)

    def _surplus(self, names: Iterable[str]) -> set[str]:
        ignored = not_loaded(self.model)
        return {name for name in names if not ignored.search(name)}

    def _tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, which transformers casts; where it is stored in FP8, it multiplies it by its scales."""
        if not isinstance(self._store, BlockFp8Folder):
            value = self._store.read(name)
            return value.float() if self._dtype == torch.float32 else value
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        values, scales = self._store.stored(name)
        if scales is None:
            return values.float()
        made: torch.Tensor = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
        return made


class WholeLayers:
    """Holds a model that is in memory as a whole: there is nothing to load."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load(self, index: int) -> None:
        """See :class:`Layers`."""

    def drop(self, index: int) -> None:
        """See :class:`Layers`."""


class MeanLayers:
    """Averages the layers of models of one shape, in fp64, rounded once.

    Args:
        parts: the models.
        weights: a weight per model; they need not sum to 1.
        rounding: rounds a mean, given its name and value.
        outside: whether to average the weights outside the layers, too.
    """

    def __init__(
        self,
        parts: Sequence[Layers],
        weights: Sequence[float],
        rounding: Rounding | None = None,
        outside: bool = True,
    ) -> None:
        self._parts, self._weights, self._rounding = parts, weights, rounding
        first = parts[0].model
        self.model: Any = empty_model(first.config, "a mean of models", torch.float32).eval()
        compute_buffers(self.model)
        if outside:
            self._fill(None)

    def load(self, index: int) -> None:
        """See :class:`Layers`."""
        self._fill(index)

    def drop(self, index: int) -> None:
        """See :class:`Layers`."""
        _layers(self.model)[index].to("meta")

    def _fill(self, index: int | None) -> None:
        sums: dict[str, torch.Tensor] = {}
        for part, weight in zip(self._parts, self._weights, strict=True):
            if index is not None:
                part.load(index)
            for name, tensor in weights_of(part.model, index):
                term = tensor.detach().double() * weight
                sums[name] = sums[name] + term if name in sums else term
            if index is not None:
                part.drop(index)
        total = sum(self._weights)
        means = {name: (one / total).float() for name, one in sums.items()}
        self.model.load_state_dict(means, strict=False, assign=True)
        if index is not None:
            compute_layer_buffers(self.model, index)
        if index is None:
            self.model.tie_weights(missing_keys=set(), recompute_mapping=False)
        round_weights(self.model, index, self._rounding)


def layers_of(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    outside: bool = True,
    left_out: Callable[[str], bool] = lambda name: False,
) -> Layers:
    """Open a source to be read one layer at a time, as stock transformers reads it; a ``.gguf`` file is read as a whole.

    Args:
        checkpoint: a dense model, a MoE, a mix (of which the base is read) or a mean of several models.
        dtype: the dtype to round weights to, as a recipe's ``dtype`` means it; None: nothing is rounded.
        outside: whether to read embeddings, the last norm and the head, too.
        left_out: tells by its name in the stock class whether a weight of a folder is not read.
    """
    from upcycle.checkpoints.merged_checkpoint import MergedCheckpoint

    rounding: Rounding | None = None if dtype is None else partial(_rounded, checkpoint, dtype)
    if checkpoint.adapted is not None:
        rounding = _after(checkpoint.adapted.adapted, rounding)
    if isinstance(checkpoint, MergedCheckpoint):
        parts = checkpoint.parts
        # A conversion's source is the mean rounded to its stored dtype: MeanLayers rounds before anything else is done.
        read = [layers_of(part, outside=outside) for part, _ in parts]
        return MeanLayers(read, [weight for _, weight in parts], rounding, outside)
    if checkpoint.source.path.is_file():
        whole = WholeLayers(load_stock_model(checkpoint.source.path, torch.float32).eval())
        for index in (None, *range(len(_layers(whole.model)))):
            round_weights(whole.model, index, rounding)
        return whole
    return FolderLayers(checkpoint.source.path, rounding, outside, left_out)


def whole_model(checkpoint: Checkpoint, dtype: str | None = None) -> Any:
    """Load the source that :func:`layers_of` opens as a whole; of a folder, this is what ``from_pretrained`` returns."""
    from upcycle.checkpoints.merged_checkpoint import MergedCheckpoint

    if isinstance(checkpoint, MergedCheckpoint) or checkpoint.adapted is not None or checkpoint.source.path.is_file():
        layers = layers_of(checkpoint, dtype)
        for index in range(len(_layers(layers.model))):
            layers.load(index)
        return layers.model
    model = load_stock_model(checkpoint.source.path, torch.float32, surplus=True).eval()
    if dtype is not None:
        for index in (None, *range(len(_layers(model)))):
            round_weights(model, index, partial(_rounded, checkpoint, dtype))
    return model


def _after(first: Rounding, then: Rounding | None) -> Rounding:
    return lambda name, weight: first(name, weight) if then is None else then(name, first(name, weight))


def rounds(model: Any, checkpoint: Checkpoint, dtype: str) -> bool:
    """Return whether a recipe's ``dtype`` changes a weight of a model that is in memory."""
    return any(
        not torch.equal(_rounded(checkpoint, dtype, name, weight), weight)
        for name, weight in model.state_dict().items()
    )


def may_round(checkpoint: Checkpoint, dtype: str) -> bool:
    """Return whether a recipe's ``dtype`` can change a weight, judged by the stored dtypes of a model that is not in memory."""
    if checkpoint.source.path.is_file():
        return True
    specs = checkpoint.store.specs
    return any(not _holds(checkpoint.dtype_of(name, dtype), spec.dtype) for name, spec in specs.items())


def _holds(wide: str, narrow: str) -> bool:
    a, b = getattr(torch, wide), getattr(torch, narrow)
    return bool(a == b or (a.is_floating_point and torch.promote_types(a, b) == a))


def _rounded(checkpoint: Checkpoint, dtype: str, name: str, weight: torch.Tensor) -> torch.Tensor:
    specs = checkpoint.store.specs
    if name not in specs and dtype == "keep":
        return weight  # stored under another name, and kept as it is
    return weight.to(getattr(torch, checkpoint.dtype_of(name, dtype) if name in specs else dtype)).float()


def round_weights(model: Any, index: int | None, rounding: Rounding | None) -> None:
    """Round the weights of a layer, or (None) those outside the layers, in place."""
    if rounding is None:
        return
    with torch.no_grad():
        for name, weight in weights_of(model, index):
            weight.copy_(rounding(name, weight))


def weights_of(model: Any, index: int | None) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and stored buffers of a layer, or (None) those outside the layers, with their names in the model."""
    paths = _paths(model)
    if index is not None:
        held = paths.layers_in(model)[index].state_dict(keep_vars=True)
        return [(f"{paths.layer(index)}.{name}", tensor) for name, tensor in held.items()]
    everything = model.state_dict(keep_vars=True).items()
    return [(name, tensor) for name, tensor in everything if paths.layer_of(name) is None]


def _by_layer(model: Any, stored: Iterable[str], left_out: Callable[[str], bool]) -> dict[int | None, list[str]]:
    """Return the stored names by the layer that transformers puts them in; None: outside the layers."""
    found: dict[int | None, list[str]] = {}
    paths = _paths(model)
    for name, renamed in stock_name_of(model, stored).items():
        if left_out(renamed):
            continue
        found.setdefault(paths.layer_of(renamed), []).append(name)
    return found


def weights_not_found(model: Any, stored: Iterable[str]) -> list[str]:
    """Return the names of weights that transformers finds neither under a stored name nor tied to another weight,
    and that the class does not compute.

    The list is empty where transformers has a rule that makes several weights of one tensor: names do not tell which it makes.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if any(
        len(rule.target_patterns) > 1 for rule in get_model_conversion_mapping(model) if hasattr(rule, "operations")
    ):
        return []
    found, tied = set(stock_name_of(model, stored).values()), model.all_tied_weights_keys
    found |= {one for one, other in tied.items() if other in found} | {
        other for one, other in tied.items() if one in found
    }
    computed = may_be_missing(model)
    return [name for name in model.state_dict() if name not in found and not computed.search(name)]


def _paths(model: Any) -> ModulePaths:
    return module_paths_in(model)


def _layers(model: Any) -> Any:
    return _paths(model).layers_in(model)


def _compute_missing(model: Any) -> None:
    """Compute the weights outside the layers that files need not hold, as the class says (sinusoids), as ``from_pretrained`` does."""
    computed = may_be_missing(model)
    for name, weight in weights_of(model, None):
        if not weight.is_meta or not computed.search(name):
            continue
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        made = torch.empty_like(weight, device="cpu")
        setattr(module, leaf, torch.nn.Parameter(made) if leaf in module._parameters else made)
        with torch.no_grad():
            model._init_weights(module)


def compute_buffers(model: Any) -> None:
    """Compute the buffers that no file holds (rotary frequencies, Gemma's scale) for a model built on the meta device.

    Every stock class can: transformers builds on the meta device, too, and then calls this function of the class.
    """
    settle_code_paths()
    _compute_buffers(model, model)


def compute_layer_buffers(model: Any, index: int) -> None:
    """Compute the buffers of a layer that no file holds (masks, positions) as ``from_pretrained`` does, by the stock class."""
    _compute_buffers(_layers(model)[index], model)


def _compute_buffers(module: Any, owner: Any) -> None:
    """Compute the buffers of a module and of those below it; ``owner`` is the nearest stock model that it belongs to."""
    owner = module if hasattr(module, "_init_weights") else owner
    names = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
    if any(module._buffers[name].is_meta for name in names):
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        with torch.no_grad():
            owner._init_weights(module)
    for child in module.children():
        _compute_buffers(child, owner)
