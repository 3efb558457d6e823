"""What is done to a model between loading and training, and the small files that its checkpoints carry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures import stock
from upcycle.architectures.clean_settings import CONFIG, clean_config, clean_file
from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock_auto import is_encoder
from upcycle.checkpoints.tokenizer_files import copy_files
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.links import copy_inside
from upcycle.files.local_names import LOCAL_NAMES_FILE as LOCAL_FILE
from upcycle.files.local_names import here
from upcycle.files.locate import locate
from upcycle.models.experts import has_experts
from upcycle.trainers.checkpoints.write import CONVERSION
from upcycle.trainers.routing.neuron_records import replace_activations

_CONVERSION_FILES = ("upcycle.json", "recipe.yaml", LOCAL_FILE)
_ALIGNMENT = 64  # bytes
STORED_FILE = "stored.json"  # how the trained model's weights are to be stored when they are exported


def prepare_model(model: Any, *, checkpointing: bool, activation: str | None, where: str) -> None:
    """Set how a model computes.

    Raises:
        UsageError: its activation function cannot be replaced.
    """
    if activation:
        if has_experts(model):
            raise UsageError(
                f"activation: {where} is a MoE; only a dense model's activation functions are replaced",
                hint="replace them before it is converted",
            )
        replace_activations(model, activation)
    _align(model)
    settings = {"use_reentrant": False}  # reentrant, it would hide routers from every loss
    if checkpointing and hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    elif checkpointing:  # its name before transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _align(model: Any) -> None:
    """Move weights that lie in a mapped file to memory that begins at a multiple of 64 bytes, as all other tensors do.

    MKL may round a product otherwise where a matrix begins elsewhere, and a run that is continued reads its weights from another file.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % _ALIGNMENT:
            weight.data = weight.data.clone()


def parent_folder(named: str, model: Path, key: str = "distillation.parent", instead: str | None = None) -> Path:
    """The dense parent of a model: as named, or (``auto``) what ``model`` was converted from.

    Args:
        named: a source, or ``auto``.
        model: the folder that is trained.
        key: the recipe's key that names it, for errors.
        instead: what else would do, for hints.

    Raises:
        UsageError: it is not known, or not where the conversion says.
    """
    if named != "auto":
        return locate(named).path
    hint = f"name the dense model: {key}" + (f", or give {instead}" if instead else "")
    for folder in (model, model / CONVERSION):
        if (folder / "upcycle.json").is_file():
            record = read_json(folder / "upcycle.json")["source"]
            try:
                return locate(here(folder, record["name"]), record["revision"]).path
            except UsageError as error:
                raise UsageError(f"{key}: {error.message}", hint=hint) from None
    raise UsageError(f"{key}: {model} does not say what it was converted from", hint=hint)


def check_parent(parent: Any, student: Any, where: Path, length: int) -> None:
    """Refuse a parent that cannot read what the student reads.

    Args:
        parent: the model to distil from.
        student: the model that is trained.
        where: the parent's folder.
        length: tokens in a row.

    Raises:
        UsageError: it has another number of tokens, or a shorter context than a row.
    """
    theirs, ours = text_config(parent.config), text_config(student.config)
    if theirs.vocab_size != ours.vocab_size:
        raise UsageError(
            f"distillation.parent: {where} has {theirs.vocab_size} tokens, the student {ours.vocab_size}",
            hint="distil from the model that was converted",
        )
    context = getattr(theirs, "max_position_embeddings", None)
    if context and context < length:
        raise UsageError(
            f"distillation.parent: {where} reads {context} tokens at a time, and a row has {length}",
            hint=f"length: {context}, or a parent with a longer context",
        )


def check_parent_tokens(parent: Any, student: Any, where: Path) -> None:
    """Refuse a parent to whose tokenizer the student's ids mean other tokens: it would teach noise.

    Args:
        parent: its tokenizer.
        student: the student's tokenizer.
        where: the parent's folder.

    Raises:
        UsageError: a token of the student's has another id there, or none.
    """
    theirs, ours = parent.get_vocab(), student.get_vocab()
    others = [token for token, index in ours.items() if theirs.get(token) != index]
    if others:
        examples = ", ".join(
            f"{token!r} is {ours[token]} and there {theirs.get(token, 'unknown')}" for token in others[:3]
        )
        raise UsageError(
            f"distillation.parent: {where} has other ids for {len(others):,} of the student's {len(ours):,} tokens ({examples})",
            hint="distil from the model that was converted, or from one with the same tokenizer",
        )


def collect_small_files(model: Path, folder: Path) -> None:
    """Put into ``folder`` what every checkpoint of a run carries beside weights: tokenizer, licence, origin, stored form."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(model, folder, tokenizer=True)
    origin = model / CONVERSION if (model / CONVERSION).is_dir() else model
    for name in _CONVERSION_FILES:
        if (origin / name).is_file():
            (folder / CONVERSION).mkdir(exist_ok=True)
            copy_inside(origin / name, origin, folder / CONVERSION / name)
    stored = read_json(model / STORED_FILE) if (model / STORED_FILE).is_file() else stored_form(model)
    (folder / STORED_FILE).write_text(json.dumps(stored) + "\n", encoding="utf-8")


def stored_form(model: Path) -> dict[str, Any]:
    """How a folder stores its weights: the most frequent dtype, other dtypes by name, and whether experts are fused."""
    specs = SafetensorsFolder(model).specs
    sizes: dict[str, int] = {}
    for spec in specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.elements
    usual = max(sizes, key=lambda dtype: sizes[dtype])
    others = {name: spec.dtype for name, spec in specs.items() if spec.dtype != usual}
    fused = any(name.endswith(".experts.gate_up_proj") for name in specs)
    return {"dtype": usual, "others": others, "layout": "fused" if fused else "per-expert"}


def save_config(model: Any, folder: Path) -> None:
    """Write ``config.json`` as stock transformers does, with the dtype of a checkpoint's weights."""
    config = clean_config(_plain(model.config.to_dict())) | {"dtype": "float32", "use_cache": True}
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def predicts_masked(folder: Path) -> bool:
    """Whether the model in a folder is a masked language model, as all encoders are that are trained; it is not loaded."""
    return is_encoder(clean_file(folder / CONFIG))


def tokenizer_of(folder: Path) -> Any:
    """The model's tokenizer.

    Raises:
        UsageError: there is none.
    """
    return stock.load_tokenizer(folder)
