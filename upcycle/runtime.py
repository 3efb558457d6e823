"""Runs dense and converted models with stock transformers code, whole or one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import CheckpointError
from upcycle.tensor_files import SafetensorsFolder

if TYPE_CHECKING:
    from upcycle.checkpoint import DenseCheckpoint
    from upcycle.job import Job

State = dict[str, torch.Tensor]
_NOT_IN_LAYERS = None


class StockModel:
    """A stock causal language model in fp32 whose weights come from ``read``.

    ``read(None)`` gives everything outside the decoder layers, ``read(i)`` layer ``i``, under the names of the stock
    modules. With ``streamed`` a layer is read before it runs and dropped after it; a model larger than memory can run.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape.
    """

    def __init__(self, config: Mapping[str, Any], read: Callable[[int | None], State], streamed: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        values = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
        settings = AutoConfig.for_model(config["model_type"], **values)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        self.model.eval()
        use_eager_experts(self.model)
        # Buffers that are computed, not loaded, do not exist on the meta device.
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(settings)
        self.layers = self.model.model.layers
        self._read = read
        self._streamed = streamed
        outside = read(_NOT_IN_LAYERS)
        problems = self.model.load_state_dict(outside, strict=False, assign=True)
        missing = [name for name in problems.missing_keys if not name.startswith("model.layers.")]
        if settings.tie_word_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
            missing = [name for name in missing if name != "lm_head.weight"]
        if missing or problems.unexpected_keys:
            raise CheckpointError(f"weights do not fit {config['model_type']}: {missing or problems.unexpected_keys}")
        for index, layer in enumerate(self.layers):
            if streamed:
                layer.register_forward_pre_hook(lambda *_, index=index: self.load(index))
                layer.register_forward_hook(lambda *_, index=index: self.drop(index))
            else:
                self.load(index)

    def load(self, index: int) -> None:
        """Read one layer into memory."""
        prefix = f"model.layers.{index}."
        state = {name.removeprefix(prefix): tensor for name, tensor in self._read(index).items()}
        try:
            self.layers[index].load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"layer {index} does not fit {self.model.config.model_type}: {error}") from None

    def drop(self, index: int) -> None:
        """Give a streamed layer's memory back."""
        if self._streamed:
            self.layers[index].to("meta")

    def block(self, index: int) -> torch.nn.Module:
        """The FFN or MoE block of a layer, in memory until it is dropped."""
        if self._streamed:
            self.load(index)
        block: torch.nn.Module = self.layers[index].mlp
        return block

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Fp32 ``[N, T, V]`` for token ids ``[N, T]``."""
        with torch.no_grad():
            result: torch.Tensor = self.model(ids, use_cache=False).logits
        return result


def dense_model(checkpoint: DenseCheckpoint, dtype: str, streamed: bool) -> StockModel:
    """The dense model with its weights rounded to the dtype they are converted in, computed in fp32."""
    family, config = checkpoint.family, checkpoint.config

    def read(layer: int | None) -> State:
        if layer is None:
            names = {**family.first_specs(config), **family.last_specs(config)}
        else:
            names = {**family.layer_specs(config, layer), **family.ffn_specs(config, layer)}
        return {name: checkpoint.read(name, dtype).float() for name in names}

    return StockModel(checkpoint.raw_config, read, streamed)


def converted_model(job: Job, folder: Path, config: Mapping[str, Any], streamed: bool) -> StockModel:
    """The converted model from its files, experts fused as the stock modules keep them in memory."""
    store = SafetensorsFolder(folder)
    units = {unit.layer: unit for unit in job.units if unit.layer is not None}
    outside = [entry.name for unit in job.units if unit.layer is None for entry in unit.entries]

    def read(layer: int | None) -> State:
        if layer is None:
            return {name: store.read(name).float() for name in outside}
        entries = units[layer].entries
        state = {entry.name: store.read(entry.name).float() for entry in entries if entry.built is None}
        if layer in job.shape.moe_layers:
            where = {part: entry.name for entry in entries if entry.built for part in entry.built.parts[:1]}
            for tensor in job.target.moe_tensors(job.dense, job.shape, layer, "fused"):
                whole = job.recipe.layout == "fused" or len(tensor.parts) == 1
                names = [where[tensor.parts[0]]] if whole else [where[part] for part in tensor.parts]
                pieces = [store.read(name).float() for name in names]
                state[tensor.name] = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).view(tensor.shape)
        return state

    return StockModel(config, read, streamed)


def load_stock(folder: Path) -> Any:
    """Load a folder with ``AutoModelForCausalLM`` in fp32, as any user would, and refuse the least disagreement.

    Raises:
        CheckpointError: a key is missing, unexpected or mismatched.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, local_files_only=True
        )
    model, report = loaded
    problems = {kind: keys for kind, keys in report.items() if keys}
    if problems:
        raise CheckpointError(f"transformers does not load {folder} cleanly: {problems}")
    return use_eager_experts(model.eval())


def use_eager_experts(model: Any) -> Any:
    """Run experts one after another: the default kernel (grouped_mm) refuses widths that are not 16 bytes wide."""
    if hasattr(model, "set_experts_implementation") and any(
        hasattr(layer.mlp, "experts") for layer in model.model.layers
    ):
        model.set_experts_implementation("eager")
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)
