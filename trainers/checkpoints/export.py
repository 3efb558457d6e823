"""Exports a checkpoint of a run to a stock transformers folder, with one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.clean_settings import clean_config
from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import empty_model
from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit, shards_of
from upcycle.checkpoints.shard_writer import Journal, ShardWriter, write_index
from upcycle.errors import CheckpointError, UsageError
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.hashing import hash_file
from upcycle.files.links import copy_inside, inside
from upcycle.files.local_names import without_paths
from upcycle.files.names import TRAINED
from upcycle.files.output.ownership import CHECKPOINTS, check_apart, check_output
from upcycle.files.output.workspace import Workspace, explained_system_errors, sweep
from upcycle.files.user_paths import user_path
from upcycle.notebook import IN_NOTEBOOKS, HtmlShown
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import parse_size
from upcycle.trainers.checkpoints.prepare_model import STORED_FILE
from upcycle.trainers.checkpoints.read import SavedRun, open_checkpoint
from upcycle.trainers.checkpoints.write import CONVERSION, OPTIMIZER, STATE_FILE

if TYPE_CHECKING:
    import torch

_NOT_COPIED = (STATE_FILE, STORED_FILE, "config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Exported(HtmlShown):
    """What an export wrote: the folder, its dtype, layout and size, and how far the model was trained."""

    out: str
    dtype: str
    layout: str
    step: int
    tokens: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return dict(vars(self))


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str = "keep",
    layout: str = "keep",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress = IN_NOTEBOOKS,
) -> Exported:
    """Write the model of a checkpoint as stock transformers stores it.

    Args:
        checkpoint: a folder such as ``RUN/checkpoints/step-00000100``, or the run's, whose newest checkpoint is taken.
        out: the folder to write.
        dtype: of the weights; ``keep``: that of the model that training began with.
        layout: ``per-expert``, ``fused``, or ``keep``: that of the model that training began with.
        max_shard_size: largest size of a weight file, such as ``5GB``.
        overwrite: replace an ``out`` that upcycle wrote, once the new one is complete.
        progress: what to report to.

    Raises:
        CheckpointError: there is no checkpoint, or a file of it is damaged.
        UsageError: ``out`` is not empty.
    """
    out = user_path(out).absolute()
    check_output(out, overwrite)
    saved = _opened(user_path(checkpoint))
    _check_apart(out, saved.folder)
    if "adapter" in saved.state:
        raise UsageError(
            f"{saved.folder} holds an adapter, and not a whole model",
            hint="the run writes it into RUN/adapter at its end; merge it: upcycle merge RUN/adapter OUT",
        )
    if saved.state.get("unmasked", 1.0) < 1:
        raise UsageError(
            f"{saved.folder}: {saved.state['unmasked']:.0%} of the masks of a grown model are gone: it is no stock model yet",
            hint="continue the run until its masks are gone",
        )
    stored = read_json(saved.folder / STORED_FILE)
    kept = {"dtype": stored["dtype"], "layout": stored["layout"]}
    dtype = kept["dtype"] if dtype == "keep" else dtype
    layout = kept["layout"] if layout == "keep" else layout
    # Some tensors have a dtype of their own, such as biases on the choice of experts, and keep it.
    others = stored["others"] if layout == kept["layout"] else {}
    converter = _Converter(saved.folder, dtype, layout, others)
    saved.check_files()
    for path in (*_plain_files(saved.folder), *(saved.folder / CONVERSION).glob("*")):
        inside(path, saved.folder)
    shards = shards_of(converter.units(), parse_size(max_shard_size))
    fingerprint = json.dumps([saved.state["files"], dtype, layout, max_shard_size], sort_keys=True)
    fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()
    with (
        explained_system_errors(out),
        Workspace(out, fingerprint, overwrite, kind="export", disposable=True, note=progress.note) as workspace,
    ):
        if not workspace.finished:
            hashes = _write_weights(converter, shards, workspace.folder, progress)
            sweep(workspace.folder)
            _small_files(saved, workspace.folder, dtype, hashes)
        folder = workspace.publish()
    size = sum(shard.nbytes for shard in shards)
    return Exported(str(folder), dtype, layout, saved.step, int(saved.state["tokens"]), size)


def _check_apart(out: Path, checkpoint: Path) -> None:
    """Refuse an output that is the run or one of its checkpoints, or lies around or among them."""
    check_apart(out, checkpoint, "the checkpoint", inside=True)
    folder = Path(os.path.realpath(checkpoint)).parent
    if folder.name == CHECKPOINTS:
        check_apart(out, folder.parent, "the run")
        check_apart(out, folder, "the run's checkpoints", inside=True)


def _write_weights(converter: _Converter, shards: Sequence[Shard], folder: Path, progress: Progress) -> dict[str, str]:
    """Write every shard; returns the SHA-256 of each file by its name."""
    hashes = {}
    with progress.phase("exporting", sum(len(shard.units) for shard in shards)):
        for shard in shards:
            with ShardWriter(folder, shard, Journal(folder)) as writer:
                for unit in shard.units:
                    if unit.name not in writer.done:
                        tensors = converter.tensors(unit.layer)
                        for entry in unit.entries:
                            writer.write(entry, [tensors[entry.name]])
                        writer.finish(unit)
                    progress.advance()
            hashes[shard.file] = writer.sha256
    write_index(folder, shards)
    return hashes


def _opened(folder: Path) -> SavedRun:
    from upcycle.trainers.checkpoints.write import finished

    newest = finished(folder) if (folder / "checkpoints").is_dir() else []
    return open_checkpoint(newest[-1] if newest else folder)


class _Converter:
    """Gives the tensors of a checkpoint under the names they are stored by, layer by layer.

    In the layout ``per-expert`` they are named and cut by transformers' own rules, those that ``save_pretrained`` follows.
    """

    def __init__(self, folder: Path, dtype: str, layout: str, others: dict[str, str]) -> None:
        self._store = SafetensorsFolder(folder)
        self._dtype, self._others = dtype, others
        self._per_expert = layout == "per-expert"
        self._model = empty_model(read_json(folder / "config.json"), str(folder))
        paths = module_paths_of(self._model.config)
        self._by_layer: dict[int | None, list[str]] = {}
        for name in self._store.specs:
            self._by_layer.setdefault(paths.layer_of(name), []).append(name)

    def units(self) -> list[Unit]:
        """One unit of what is outside the layers, then one per layer, with the names, shapes and dtypes to be stored."""
        import torch

        found = []
        for layer in sorted(self._by_layer, key=lambda layer: -1 if layer is None else layer):
            with torch.device("meta"):
                state = {name: torch.empty(self._store.specs[name].shape) for name in self._by_layer[layer]}
                named = self._named(state)
            entries = tuple(
                OutputEntry(name, TensorSpec(tuple(tensor.shape), self._others.get(name, self._dtype)))
                for name, tensor in sorted(named.items(), key=lambda item: _natural(item[0]))
            )
            found.append(Unit("outside" if layer is None else f"layer {layer}", layer, _aligned(entries)))
        return found

    def tensors(self, layer: int | None) -> dict[str, torch.Tensor]:
        """The tensors of one layer, or of what is outside the layers (``None``), by stored name."""
        import torch

        named = self._named({name: self._store.read(name) for name in self._by_layer[layer]})
        return {
            name: tensor.to(getattr(torch, self._others.get(name, self._dtype))).contiguous()
            for name, tensor in named.items()
        }

    def _named(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._per_expert:
            return state
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self._model, state)
        return reverted


def _aligned(entries: tuple[OutputEntry, ...]) -> tuple[OutputEntry, ...]:
    """The entries with wider dtypes first, so that every tensor is aligned to the size of its elements."""
    from upcycle.files.formats.tensor_spec import ITEM_SIZE

    return tuple(sorted(entries, key=lambda entry: -ITEM_SIZE[entry.spec.dtype]))


def _small_files(saved: SavedRun, folder: Path, dtype: str, hashes: dict[str, str]) -> None:
    for path in _plain_files(saved.folder):
        copy_inside(path, saved.folder, folder / path.name)
    origin = saved.folder / CONVERSION
    config = _config(saved, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    training = {
        "step": saved.step,
        "tokens": saved.state["tokens"],
        "loss": saved.state["loss"],
        "validation": saved.state["validation"],
        "recipe": without_paths(saved.state["recipe"]),
        "versions": saved.state["versions"],
    }
    converted = (origin / records.FILE).is_file()
    if converted:
        for path in origin.iterdir():
            copy_inside(path, saved.folder, folder / path.name)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in hashes and path.name not in (*records.UNHASHED, TRAINED):
            hashes[path.name] = hash_file(path)
    files = {"files": dict(sorted(hashes.items()))}
    if not converted:
        (folder / TRAINED).write_text(json.dumps({**training, **files}, indent=2) + "\n", encoding="utf-8")
        return
    record = {**read_json(origin / records.FILE), "training": training, **files}
    (folder / records.FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _config(saved: SavedRun, dtype: str) -> dict[str, Any]:
    """The model's ``config.json`` at the end of training, with the dtype that is written."""
    config = read_json(saved.folder / "config.json")
    if "model_type" not in config:
        raise CheckpointError(f"{saved.folder / 'config.json'} names no model_type")
    return clean_config(config) | {"dtype": dtype}


def _plain_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        weights = path.name.endswith(".safetensors") and path.name.startswith(("model-", OPTIMIZER))
        if path.is_file() and not weights and path.name not in _NOT_COPIED:
            yield path


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
