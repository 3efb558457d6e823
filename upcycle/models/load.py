"""Loads any model that can be named, dense or MoE, into memory as stock transformers runs it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from upcycle.architectures import stock
from upcycle.architectures.clean_settings import CONFIG, clean_file
from upcycle.architectures.dense.widened import refuse_masked
from upcycle.architectures.stock_auto import is_encoder, is_encoder_decoder
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.formats.packed_folder import is_packed
from upcycle.files.formats.tensor_files import SafetensorsFolder, read_config
from upcycle.files.formats.tensor_names import is_block_fp8
from upcycle.files.locate import locate
from upcycle.hardware.memory import available_memory
from upcycle.models.experts import use_experts
from upcycle.models.first_calls import settle_code_paths
from upcycle.models.stock_layers import FolderLayers

_MOST_MEMORY = 0.9  # of what is available, for weights alone


def load_model(
    source: str | Path,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: torch.device | None = None,
    experts: str | None = "eager",
    training: bool = False,
    encoder: bool = False,
) -> Any:
    """Load a stock causal language model, for use or for training; or an encoder.

    Args:
        source: a folder; a name may also be a hub id, a ``.gguf`` file or ``demo``.
        dtype: the dtype of its weights; ``auto``: as stored. A ``.gguf`` file is read in fp32.
        device: the device of its weights; default: the CPU.
        experts: transformers' implementation of experts, ``auto`` for the fastest here (see
            :func:`~upcycle.models.experts.use_experts`), or None for transformers' own choice.
        training: return it in training mode and without a cache, and refuse stored weights that the model does not have: an
            export would lose them. Memory is not checked: ``plan train`` forecasts it for all ranks. Of encoders, masked language
            models are trained.
        encoder: whether an encoder is wanted, and nothing else.

    Raises:
        UsageError: there is no such model, or no such implementation of experts.
        CheckpointError: transformers cannot load it.
        EnvironmentFault: it does not fit in memory, or the hub cannot be reached.
    """
    settle_code_paths()
    path = source if isinstance(source, Path) else locate(source).path
    _check_kind(path, source, training, encoder)
    if path.is_file():
        dtype = torch.float32
    elif not training:
        _check_memory(path, str(source), dtype)
    wanted = "auto" if isinstance(dtype, str) else dtype
    model = stock.load_stock_model(path, wanted, surplus=not (training or path.is_file()))
    if device is not None:
        model.to(device)
    _make_ready(model, experts, training)
    return model


def open_layers(
    source: Path,
    dtype: torch.dtype,
    experts: str | None,
    device: torch.device | None = None,
    left_out: Callable[[str], bool] = lambda name: False,
) -> FolderLayers | None:
    """Open the folder of a model that is to be trained, or to teach, without reading a weight; they are read layer by layer later.

    Args:
        source: the folder.
        dtype: of its weights in memory.
        experts: see :func:`load_model`.
        device: that it will run on; default: the CPU.
        left_out: tells by its name whether a weight is in no file.

    Returns:
        The model on the meta device, in training mode and without a cache; ``None`` where transformers must load the whole: FP8,
        and classes that keep some weights in another dtype than the rest.

    Raises:
        UpcycleError: as :func:`load_model`, apart from what is found when weights are read.
    """
    settle_code_paths()
    _check_kind(source, source, training=True, encoder=False)
    if not source.is_dir() or is_block_fp8(read_config(source)):
        return None
    layers = FolderLayers(source, outside=False, left_out=left_out, dtype=dtype)
    others = "|".join(layers.model._get_dtype_plan(dtype)) or r"(?!)"
    if any(re.search(others, name) for name, _ in layers.model.named_parameters()):
        return None
    _make_ready(layers.model, experts, True, device.type if device else "cpu")
    return layers


def _make_ready(model: Any, experts: str | None, training: bool, device: str | None = None) -> None:
    model.train(training)
    if training:
        model.config.use_cache = False
    if experts is not None:
        use_experts(model, experts, device)


def _check_kind(path: Path, source: str | Path, training: bool, encoder: bool) -> None:
    """Refuse what is not the kind of model that is wanted; see :func:`load_model`."""
    raw = clean_file(path / CONFIG) if path.is_dir() else {}
    if not training:
        refuse_masked(path, str(source))
    found = bool(raw) and is_encoder(raw)
    if training and path.is_dir() and is_packed(read_config(path)):
        raise UsageError(
            f"{source} holds weights in few bits, which no gradient can change",
            hint="train the full-precision model that it was made from, and round the result: upcycle compress MOE OUT --bits 4",
        )
    if found and training and not str((raw.get("architectures") or [""])[0]).endswith("ForMaskedLM"):
        raise UsageError(
            f"{source} is an encoder without a head for masked tokens, and upcycle trains by the loss of masked or next tokens",
            hint="transformers' Trainer trains it after `import upcycle.models`, with a loss of yours",
        )
    if found and not encoder and not training:
        raise UsageError(
            f"{source} is an encoder: it writes no text, and has no perplexity",
            hint="upcycle verify and evaluate measure it; transformers' AutoModel loads it after `import upcycle.models`",
        )
    if raw and is_encoder_decoder(raw):
        raise UsageError(
            f"{source} has an encoder and a decoder: this command runs models that continue one text",
            hint="upcycle verify compares its logits; transformers loads it after `import upcycle.models`, and generates",
        )
    if encoder and not found:
        raise UsageError(f"{source} is no encoder, and is to be compared with one", hint="name its dense parent")


def _check_memory(path: Path, name: str, dtype: torch.dtype | Literal["auto"]) -> None:
    specs = SafetensorsFolder(path).specs.values()
    needed = sum(spec.nbytes if isinstance(dtype, str) else spec.elements * dtype.itemsize for spec in specs)
    if needed > _MOST_MEMORY * available_memory():
        raise EnvironmentFault(
            f"{name} needs about {needed / 1e9:.0f} GB, and {available_memory() / 1e9:.0f} GB are available",
            hint="use a machine with more memory",
        )
