"""Runs dense and converted models with stock transformers code, whole or one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.module_paths import module_paths_in, module_paths_of
from upcycle.architectures.stock import build_config, empty_model, load_stock_model
from upcycle.architectures.stock_auto import is_encoder
from upcycle.architectures.stock_classes import StateDict
from upcycle.errors import CheckpointError
from upcycle.models.experts import use_eager_experts
from upcycle.models.first_calls import settle_code_paths
from upcycle.models.model_inputs import ModelRun
from upcycle.models.stock_layers import FolderLayers, Layers, compute_buffers, layers_of, whole_model

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint

Reader = Callable[[int | None], StateDict]


class StockModel:
    """Runs a stock causal language model or encoder in fp32, in memory as a whole or (with ``layers``) streamed.

    A layer of a streamed model is read before it runs and dropped afterwards, so that a model larger than memory can run.
    """

    def __init__(self, model: Any, layers: Layers | None = None) -> None:
        settle_code_paths()
        self.model = use_eager_experts(model.eval())
        self._run, self._paths = ModelRun(model), module_paths_in(model)
        self.gives_states = self._run.gives_states
        self.layers = self._paths.layers_in(model)
        self._streamed = layers
        if layers:
            for index, layer in enumerate(self.layers):
                layer.register_forward_pre_hook(lambda *_, index=index: self.load(index))
                layer.register_forward_hook(lambda *_, index=index: self.drop(index))

    def load(self, index: int) -> None:
        """Read one layer into memory, if the model is streamed."""
        if self._streamed:
            self._streamed.load(index)

    def drop(self, index: int) -> None:
        """Free the weights of one layer, if the model is streamed."""
        if self._streamed:
            self._streamed.drop(index)

    def layer_of(self, name: str) -> int | None:
        """Return the number of the layer that a tensor or module is in; None: it is always in memory."""
        return self._paths.layer_of(name)

    def blocks(self, index: int) -> list[torch.nn.Module]:
        """Return the modules whose outputs add up to a layer's FFN or MoE block; they are in memory until it is dropped."""
        self.load(index)
        return self._paths.blocks_in(self.layers[index])

    def logits(self, ids: torch.Tensor, last: int = 0, given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return fp32 logits ``[N, T, V]`` for token ids ``[N, T]``, or an encoder's states ``[N, T, d]``.

        See :meth:`upcycle.models.model_inputs.ModelRun.compared`. An encoder of images or sounds takes seeds
        ``[N, 1]``, or images ``[N, C, H, W]``.
        """
        return self._run.compared(ids, last, given)

    def logits_of(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return fp32 logits ``[N, T, V]`` for all that a model of parts reads, by the names of its arguments."""
        with torch.no_grad():
            result: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return result


def output_of(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a block adds to the stream, for its input; some stock classes return the router's logits, too."""
    output = block(x)
    added: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return added


def skeleton(config: Mapping[str, Any], outside: StateDict) -> Any:
    """Build the stock model of ``config`` in fp32, with the weights ``outside`` the layers and decoder layers without weights.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape.
    """
    settle_code_paths()
    settings = build_config(config, "config.json")
    model = empty_model(settings, "config.json", torch.float32)
    # Buffers that are computed, not loaded, do not exist on the meta device.
    compute_buffers(model)
    paths = module_paths_of(settings)
    in_memory = {name: f"{paths.head}.weight" if name == paths.head_weight else name for name in outside}
    problems = model.load_state_dict({in_memory[k]: v for k, v in outside.items()}, strict=False, assign=True)
    outside_layers = [name for name in problems.missing_keys if paths.layer_of(name) is None]
    if is_encoder(settings):  # whose heads are not run here
        missing = [name for name in outside_layers if not paths.body or name.startswith(f"{paths.body}.")]
    else:
        missing = [name for name in outside_layers if paths.has(name)]
    if getattr(settings, "tie_word_embeddings", False) and not is_encoder(settings):
        model.get_submodule(paths.head).weight = model.get_submodule(paths.embedding).weight
        missing = [name for name in missing if name != f"{paths.head}.weight"]
    if missing or problems.unexpected_keys:
        raise CheckpointError(f"weights do not fit {config['model_type']}: {missing or problems.unexpected_keys}")
    return model


def fill(layer: torch.nn.Module, prefix: str, state: StateDict) -> None:
    """Give one decoder layer its weights: ``state`` has them by name in the model, and every name begins with ``prefix.``.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape.
    """
    own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items()}
    try:
        layer.load_state_dict(own, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{prefix} does not fit its stock class: {error}") from None


def source_model(checkpoint: Checkpoint, dtype: str | None, streamed: bool) -> StockModel:
    """Load a source in fp32, as stock transformers reads its files.

    Args:
        checkpoint: a dense model or a MoE; of a mix, the base is loaded.
        dtype: the dtype to round the weights to, as a recipe's ``dtype`` means it; None: leave them as stored.
        streamed: keep one layer at a time in memory. A ``.gguf`` file is loaded as a whole even so.
    """
    if not streamed:
        return StockModel(whole_model(checkpoint, dtype))
    layers = layers_of(checkpoint, dtype)
    return StockModel(layers.model, layers)


def dense_reader(checkpoint: DenseCheckpoint, dtype: str) -> Reader:
    """Return a function that reads a layer's weights, or (None) those outside the layers, rounded to ``dtype``, as fp32."""
    family, config = checkpoint.family, checkpoint.config

    def read(layer: int | None) -> StateDict:
        stored = family.stored_specs(config, layer)
        return {family.model_name(name): checkpoint.read(name, dtype).float() for name in stored}

    return read


def folder_model(folder: Path, streamed: bool) -> StockModel:
    """Load a folder that upcycle wrote as every user would, or stream it with the same code of transformers."""
    if not streamed:
        return StockModel(load_stock_model(folder, torch.float32))
    layers = FolderLayers(folder)
    return StockModel(layers.model, layers)
