"""Writes a model with a LoRA folder added to its weights as a stock folder, block by block, and checks it against both apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.adapters.adapted_store import AdaptedStore
from upcycle.adapters.folder import AdapterFolder
from upcycle.architectures.clean_settings import clean_config
from upcycle.checkpoints.checkpoint import COPY_BLOCK_BYTES
from upcycle.checkpoints.output_layout import OutputEntry, Unit, checked_finite, shards_of
from upcycle.checkpoints.shard_writer import Journal, ShardWriter, write_index
from upcycle.checkpoints.tokenizer_files import check_companions, copy_files
from upcycle.conversion.merge_check import MergeCheck, check_merge, too_large
from upcycle.conversion.threads import torch_threads
from upcycle.errors import CheckpointError, UsageError, VerificationError
from upcycle.files import records
from upcycle.files.formats.packed_folder import tensors_of
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import CONFIG, read_config
from upcycle.files.formats.tensor_names import quantized_weights, refuse_quantized
from upcycle.files.formats.tensor_spec import ITEM_SIZE
from upcycle.files.hashing import hash_file
from upcycle.files.links import copy_inside
from upcycle.files.local_names import LOCAL_NAMES_FILE, without_paths
from upcycle.files.locate_adapted import adapter_folder, base_of
from upcycle.files.names import TRAINED
from upcycle.files.output.ownership import check_apart, check_output
from upcycle.files.output.workspace import Workspace, explained_system_errors, sweep
from upcycle.files.user_paths import user_path
from upcycle.progress import SILENT, Progress
from upcycle.recipe.conversion_recipe import parse_size

if TYPE_CHECKING:
    from upcycle.files.locate import Source

ADAPTERS = "adapters"  # the key of a record that lists what was merged
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_CARRIED = (records.FILE, records.RECIPE_FILE, LOCAL_NAMES_FILE, TRAINED)


@dataclass(frozen=True)
class Merged:
    """What a merge wrote. ``changed`` counts the stored tensors that differ from the base's; ``check`` is None where nothing was
    compared."""

    out: str
    base: str
    adapter: str
    dtype: str
    changed: int
    bytes: int
    check: MergeCheck | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = SILENT,
) -> Merged:
    """Add a LoRA folder to the weights of its base, and write the result as a stock transformers folder.

    Args:
        adapter: a folder (or hub id) with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the folder to write; it appears complete or not at all.
        base: the model that it was trained on; default: what its settings name.
        revision: of the base, on the hub.
        dtype: of the weights; ``keep``: as the base stores them.
        max_shard_size: largest size of a weight file, such as ``5GB``.
        overwrite: replace an ``out`` that upcycle wrote, once the new one is complete.
        verify: compare the result's logits with those of the base with the adapter beside it.
        progress: where to report.

    Raises:
        UsageError: ``out`` is not empty, something is not there, or the adapter is in the base already.
        CheckpointError: the adapter does not fit the base, or a file is damaged.
        RefusalError: the adapter is no LoRA, or the base is quantized.
        VerificationError: the merged model computes something else; it is left in ``out`` + ``.failed``.
    """
    out = user_path(out).absolute()
    check_output(out, overwrite)
    folder = adapter_folder(str(adapter))
    source = base_of(folder, base, revision)
    if source.path.is_file():
        raise UsageError(f"{source.name} is a .gguf file", hint="name a folder with safetensors: --base MODEL")
    for read, what in ((folder, "the adapter"), (source.path, "the base")):
        check_apart(out, read, what, inside=True)
    lora = AdapterFolder(folder)
    before = _records(source.path)
    _refuse_twice(lora, before, source)
    _warn_of_another(lora, source, progress)
    raw = read_config(source.path)
    stored = tensors_of(source.path, raw)
    refuse_quantized(stored.specs, raw, source.name)
    if raw.get("quantization_config"):
        raise quantized_weights(raw, source.name, "config.json has a 'quantization_config'")
    tokenizer = folder if any((folder / name).is_file() for name in _TOKENIZERS) else source.path
    for read in {source.path, tokenizer}:
        check_companions(read, True)
    store = AdaptedStore(stored, lora, raw, source.name, dtype)
    lora.check_finite()
    units = list(_units(store))
    shards = shards_of(units, parse_size(max_shard_size))
    size = sum(shard.nbytes for shard in shards)
    identity = json.dumps([store.fingerprint, lora.sha256, dtype, max_shard_size, verify])
    with (
        explained_system_errors(out),
        Workspace(
            out,
            hashlib.sha256(identity.encode()).hexdigest(),
            overwrite,
            kind="merge",
            disposable=True,
            note=progress.note,
        ) as workspace,
    ):
        check = None
        if not workspace.finished:
            journal, hashes = Journal(workspace.folder), {}
            with progress.phase("merging", len(units)), torch_threads(1):
                for shard in shards:
                    with ShardWriter(workspace.folder, shard, journal) as writer:
                        for unit in shard.units:
                            if unit.name not in writer.done:
                                for entry in unit.entries:
                                    blocks = store.chunks(entry.name, COPY_BLOCK_BYTES)
                                    writer.write(entry, (checked_finite(entry, block) for block in blocks))
                                writer.finish(unit)
                            progress.advance()
                    hashes[shard.file] = writer.sha256
            write_index(workspace.folder, shards)
            _write_small_files(workspace.folder, source.path, tokenizer, raw, dtype)
            sweep(workspace.folder)
            check = _checked(source.path, workspace.folder, store, dtype, progress) if verify else None
            _write_record(workspace.folder, before, _entry(lora, source, check), hashes)
        broken = check is not None and not check.holds
        final = workspace.publish(failed=broken)
    if broken and check is not None:
        raise VerificationError(
            f"the merged model is not the base with the adapter: its logits differ by {check.error:.2e}, and {check.tolerance:.0e} is "
            "allowed",
            hint=f"the result is in {final}; please report this with the output of: upcycle env",
        )
    return Merged(
        str(final),
        source.name,
        str(adapter),
        _usual(store) if dtype == "keep" else dtype,
        len(store.changed),
        size,
        check,
    )


def _units(store: AdaptedStore) -> Iterator[Unit]:
    """Yield the tensors in groups: those of each layer, and before them what is outside the layers."""
    groups: dict[int, list[str]] = {}
    for name in store.specs:
        layer = re.search(r"\.(\d{1,9})\.", f".{name}")
        groups.setdefault(int(layer[1]) if layer else -1, []).append(name)
    for layer_index, names in sorted(groups.items()):
        # Wider dtypes first, so that every tensor is aligned to the size of its elements.
        ordered = sorted(names, key=lambda name: -ITEM_SIZE[store.specs[name].dtype])
        entries = tuple(OutputEntry(name, store.specs[name]) for name in ordered)
        yield Unit(
            "outside" if layer_index < 0 else f"layer {layer_index}", layer_index if layer_index >= 0 else None, entries
        )


def _usual(store: AdaptedStore) -> str:
    sizes: dict[str, int] = {}
    for spec in store.specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.elements
    return max(sizes, key=lambda name: sizes[name])


def _records(folder: Path) -> dict[str, Any]:
    """Return what upcycle recorded of a base, by file name."""
    return {name: read_json(folder / name) for name in (records.FILE, TRAINED) if (folder / name).is_file()}


def _refuse_twice(lora: AdapterFolder, before: dict[str, Any], source: Source) -> None:
    for name, record in before.items():
        merged = record.get(ADAPTERS)
        for entry in merged if isinstance(merged, list) else []:
            if isinstance(entry, dict) and entry.get("sha256") == lora.sha256:
                raise UsageError(
                    f"{source.path / name} says that {lora.folder.name} is merged into this model already",
                    hint="name the model that it was merged into: --base MODEL",
                )


def _warn_of_another(lora: AdapterFolder, source: Source, progress: Progress) -> None:
    said = lora.settings.base
    if said and said != source.name and user_path(said).absolute() != user_path(source.name).absolute():
        progress.note(
            f"the adapter was trained on {said}, and is added to {source.name}: the shapes fit, the weights may be others"
        )


def _checked(base: Path, folder: Path, store: AdaptedStore, dtype: str, progress: Progress) -> MergeCheck | None:
    if why := too_large(sum(spec.elements for spec in store.specs.values())):
        progress.note(f"not compared with the base: {why}")
        return None
    with progress.phase("comparing", 1):
        found = check_merge(base, folder, store.adapter, store.stock, store.changed_dtypes(), dtype)
        progress.advance()
    return found


def _write_small_files(folder: Path, base: Path, tokenizer: Path, raw: dict[str, Any], dtype: str) -> None:
    config = clean_config(raw)
    if dtype != "keep":
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_files(base, folder, tokenizer == base)
    if tokenizer != base:
        copy_files(tokenizer, folder, True)
    for name in _CARRIED:
        if (base / name).is_file():
            copy_inside(base / name, base, folder / name)


def _entry(lora: AdapterFolder, source: Source, check: MergeCheck | None) -> dict[str, Any]:
    """Return what the record says of an adapter that was merged."""
    trained = read_json(lora.folder / TRAINED) if (lora.folder / TRAINED).is_file() else {}
    entry: dict[str, Any] = without_paths(
        {
            "name": lora.folder.name,
            "sha256": lora.sha256,
            "base": source.name,
            "revision": source.revision,
            "training": {key: trained[key] for key in ("step", "tokens", "loss", "recipe") if key in trained} or None,
            "check": check.as_dict() if check else None,
        }
    )
    return entry


def _write_record(folder: Path, before: dict[str, Any], entry: dict[str, Any], hashes: dict[str, str]) -> None:
    name = records.FILE if records.FILE in before else TRAINED
    content = before.get(name, {"versions": records.versions()})
    if not isinstance(content.get(ADAPTERS, []), list):
        raise CheckpointError(f"{name} of the base: key '{ADAPTERS}' must be a list", hint="copy the base again")
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in hashes and path.name not in (*records.UNHASHED, TRAINED):
            hashes[path.name] = hash_file(path)
    content = {**content, ADAPTERS: [*content.get(ADAPTERS, []), entry], "files": dict(sorted(hashes.items()))}
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
