"""Packs a model whose experts are ternary into a small folder, and unpacks it again, to the same files byte for byte.

Every ``NAME.safetensors`` becomes ``NAME.packed``, a safetensors file too: it holds the first one's header, every ternary matrix in
codes, and every other tensor as it was. All other files are copied. ``upcycle.json`` of the packed folder says which file was which,
and their hashes; the model's own lies beside it under another name. Tensors of three dimensions (experts in one tensor) are packed
expert by expert, so that one that is not ternary costs no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import parse_json, read_json
from upcycle.files.formats.tensor_files import INDEX, SafetensorsFile
from upcycle.files.formats.tensor_spec import CODES, ITEM_SIZE, TensorSpec
from upcycle.files.hashing import hash_bytes, hash_file
from upcycle.files.links import copy_inside, inside
from upcycle.files.local_names import LOCAL_NAMES_FILE
from upcycle.files.names import LOCKS, RECORD
from upcycle.files.output.ownership import check_apart, check_output
from upcycle.files.output.workspace import Workspace, explained_system_errors
from upcycle.files.records import versions
from upcycle.files.user_paths import user_path
from upcycle.methods.compressing.qmoe_codec.dictionary import DICTIONARY_VERSION
from upcycle.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

    from upcycle.methods.compressing.qmoe_codec.codes import Coded

PACKED_FORMAT = "1"
_ENDING = ".packed"
_HEADER = "header"
_BLOCK = 1 << 26  # bytes of a tensor that are read at once
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_RENAMED = {RECORD: "packed.upcycle.json", INDEX: "packed.index.json"}  # else loaders would follow them


@dataclass(frozen=True)
class Packed:
    """What was packed or unpacked: the folder, the bytes of the model and of its packed form, ternary weights, bits of each."""

    out: str
    bytes: int
    bytes_packed: int
    ternary: int
    bits_per_weight: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return dict(vars(self))


class _Part(NamedTuple):
    """A tensor to be written: its name, dtype and shape, and what gives its bytes."""

    name: str
    spec: TensorSpec
    blocks: Iterable[torch.Tensor]


def pack_model(model: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Packed:
    """Pack the ternary matrices of a model.

    Args:
        model: its folder.
        out: the folder to write.
        overwrite: replace an ``out`` that upcycle wrote, once the new one is complete.
        progress: what to report to.

    Raises:
        UsageError: the model has no ternary matrix; or ``out`` is not empty.
        CheckpointError: the folder is no model, or a file of it is damaged.
    """
    folder, target = _folder(model), user_path(out).absolute()
    check_output(target, overwrite)
    check_apart(target, folder, "the model", inside=True)
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in (*LOCKS, LOCAL_NAMES_FILE))
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        from upcycle.files.formats.folder_contents import no_weights

        raise no_weights(folder)
    hashes = {name: hash_file(inside(folder / name, folder)) for name in names}
    fingerprint = hash_bytes(json.dumps(["pack", PACKED_FORMAT, DICTIONARY_VERSION, hashes], sort_keys=True).encode())
    with explained_system_errors(target), _workspace(target, fingerprint, overwrite, "packing", progress) as workspace:
        if not workspace.finished:
            stored, ternary, coded = {}, 0, 0
            with progress.phase("packing", len(names)):
                for name in names:
                    stored[name] = _RENAMED.get(name, name)
                    if name in weights:
                        stored[name] = name.removesuffix(".safetensors") + _ENDING
                        found = _pack_file(inside(folder / name, folder), workspace.folder / stored[name])
                        ternary, coded = ternary + found[0], coded + found[1]
                    else:
                        copy_inside(folder / name, folder, workspace.folder / stored[name])
                    progress.advance()
            if not ternary:
                raise UsageError(
                    f"{folder} has no ternary matrix, and nothing to pack",
                    hint=f"make its experts ternary first: upcycle compress {folder} OUT --method qmoe --calibration TEXT",
                )
            about = {
                "format": PACKED_FORMAT,
                "dictionary": DICTIONARY_VERSION,
                "ternary": ternary,
                "coded_bytes": coded,
                "files": {name: {"stored": stored[name], "sha256": hashes[name]} for name in names},
            }
            files = {name: hash_file(workspace.folder / name) for name in stored.values()}
            record = {"versions": versions(), "packed": about, "files": files}
            (workspace.folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        about = read_json(workspace.folder / RECORD)["packed"]
        result = workspace.publish()
    return _facts(result, sum((folder / name).stat().st_size for name in names), _size(result), about)


def unpack_model(
    packed: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> Packed:
    """Write the model that was packed, the same files byte for byte.

    Args:
        packed: a folder that :func:`pack_model` wrote.
        out: the folder to write.
        overwrite: replace an ``out`` that upcycle wrote, once the new one is complete.
        progress: what to report to.

    Raises:
        CheckpointError: the folder was not written by :func:`pack_model`, or a file of it is damaged.
        UsageError: ``out`` is not empty, or another version of the dictionary is needed.
    """
    folder, target = _folder(packed), user_path(out).absolute()
    check_output(target, overwrite)
    check_apart(target, folder, "the packed model", inside=True)
    about = _about(folder)
    fingerprint = hash_bytes(json.dumps(["unpack", about], sort_keys=True).encode())
    with (
        explained_system_errors(target),
        _workspace(target, fingerprint, overwrite, "unpacking", progress) as workspace,
    ):
        if not workspace.finished:
            with progress.phase("unpacking", len(about["files"])):
                for name, kept in about["files"].items():
                    source, written = folder / kept["stored"], workspace.folder / name
                    if not source.is_file():
                        raise CheckpointError(f"{source} is missing", hint="copy or download the packed model again")
                    if kept["stored"].endswith(_ENDING):
                        _unpack_file(inside(source, folder), written)
                    else:
                        copy_inside(source, folder, written)
                    if hash_file(written) != kept["sha256"]:
                        raise CheckpointError(
                            f"{source} is damaged: it does not give the {name} that was packed (its hash is another)",
                            hint="copy or download the packed model again",
                        )
                    progress.advance()
        result = workspace.publish()
    return _facts(result, sum((result / name).stat().st_size for name in about["files"]), _size(folder), about)


def _workspace(out: Path, fingerprint: str, overwrite: bool, kind: str, progress: Progress) -> Workspace:
    return Workspace(out, fingerprint, overwrite, kind=kind, disposable=True, note=progress.note)


def _folder(name: str | Path) -> Path:
    folder = user_path(name)
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="name the folder of a model on this machine")
    return folder


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _facts(out: Path, whole: int, small: int, about: dict[str, Any]) -> Packed:
    return Packed(str(out), whole, small, about["ternary"], 8 * about["coded_bytes"] / about["ternary"])


def _about(folder: Path) -> dict[str, Any]:
    """Return what a packed folder says of itself, checked: it may have been downloaded."""
    found = read_json(folder / RECORD).get("packed") if (folder / RECORD).is_file() else None
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder} is no packed model", hint="name a folder that upcycle pack wrote")
    if (found.get("format"), found.get("dictionary")) != (PACKED_FORMAT, DICTIONARY_VERSION):
        raise UsageError(
            f"{folder / RECORD}: packed with format {found.get('format')!r} and dictionary {found.get('dictionary')!r}, and this "
            f"version reads {PACKED_FORMAT!r} and {DICTIONARY_VERSION!r}",
            hint="unpack it with the version of upcycle that it names under 'versions'",
        )
    files = found.get("files")
    numbers = all(type(found.get(key)) is int and found[key] > 0 for key in ("ternary", "coded_bytes"))
    if not numbers or not isinstance(files, dict) or not files:
        raise _odd(folder, "packed")
    for name, kept in files.items():
        plain = isinstance(kept, dict) and all(isinstance(kept.get(key), str) for key in ("stored", "sha256"))
        for each in (name, kept["stored"] if plain else ""):
            if Path(each).name != each or each in ("", ".", "..") or "\0" in each:
                raise _odd(folder, "packed.files")
    return found


def _odd(folder: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / RECORD}: key '{key}' is not what upcycle pack writes",
        hint="copy or download the packed model again",
    )


def _pack_file(source: Path, target: Path) -> tuple[int, int]:
    """Write the packed form of one file; returns how many weights are in codes, and the bytes of all codes."""
    import torch

    from upcycle.methods.compressing.qmoe_codec.codes import encode_ternary

    file = SafetensorsFile(source)
    with source.open("rb") as opened:
        head = opened.read(8)
        header = head + opened.read(int.from_bytes(head, "little"))
    whole = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    parts = [_Part(_HEADER, TensorSpec((len(whole),), "uint8"), [whole])]
    ternary = coded_bytes = 0
    for name, spec in file.specs.items():
        for place, rows in _slices(spec):
            coded = None
            if spec.dtype in _FLOATS and len(spec.shape) in (2, 3):
                coded = encode_ternary(_matrix(file, name, rows))
            if coded is None or coded.bits_per_weight >= 8 * ITEM_SIZE[spec.dtype]:
                shape = (1, *spec.shape[1:]) if rows else spec.shape
                parts.append(_Part(_key(name, place), TensorSpec(shape, spec.dtype), file.chunks(name, _BLOCK, rows)))
                continue
            stored = {"codes": coded.codes.view(torch.int16), "counts": coded.counts.view(torch.int16)}
            for what, tensor in {**stored, "scales": coded.scales}.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                parts.append(_Part(_key(name, place, what), TensorSpec(tuple(tensor.shape), dtype), [tensor]))
                coded_bytes += tensor.numel() * tensor.element_size()
            ternary += len(coded.counts) * coded.columns
    _write(target, parts)
    return ternary, coded_bytes


def _slices(spec: TensorSpec) -> Iterator[tuple[int | None, tuple[int, int] | None]]:
    """Yield the parts of a tensor that are packed by themselves: a number and which rows; None: it is one whole."""
    if len(spec.shape) != 3:
        yield None, None
        return
    yield from ((place, (place, 1)) for place in range(spec.shape[0]))


def _key(name: str, place: int | None, what: str = "tensor") -> str:
    return f"{name}:{'' if place is None else place}:{what}"


def _matrix(file: SafetensorsFile, name: str, rows: tuple[int, int] | None) -> torch.Tensor:
    import torch

    whole = torch.cat([*file.chunks(name, _BLOCK, rows)])
    return whole[0] if whole.dim() == 3 else whole


def _write(target: Path, parts: list[_Part]) -> None:
    """Write a safetensors file tensor by tensor; wider dtypes first, so that every tensor is aligned."""
    import torch

    ordered = sorted(parts, key=lambda part: -ITEM_SIZE[part.spec.dtype])
    entries: dict[str, Any] = {}
    position = 0
    for part in ordered:
        end = position + part.spec.nbytes
        entries[part.name] = {
            "dtype": CODES[part.spec.dtype],
            "shape": list(part.spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in ordered:
            for block in part.blocks:
                file.write(block.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _unpack_file(source: Path, target: Path) -> None:
    """Write the safetensors file that was packed.

    Raises:
        CheckpointError: the packed file is damaged, or lacks a tensor.
    """
    import torch

    file = SafetensorsFile(source)
    try:
        header = bytes(file.read(_HEADER).numpy())
        entries: dict[str, Any] = parse_json(header[8:], str(source), most_bytes=len(header))
        entries.pop("__metadata__", None)
        ordered = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        with target.open("wb") as out:
            out.write(header)
            for name in ordered:
                for place, _ in _slices(TensorSpec(tuple(entries[name]["shape"]), "uint8")):
                    for block in _unpacked(file, name, place, entries[name]["shape"][-1:]):
                        out.write(block.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{source} is damaged: its header is not one of a packed file ({error})",
            hint="copy or download the packed model again",
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error.message}", hint="copy or download the packed model again") from None


def _unpacked(file: SafetensorsFile, name: str, place: int | None, columns: list[int]) -> Iterator[torch.Tensor]:
    from upcycle.methods.compressing.qmoe_codec.codes import decode_ternary

    if _key(name, place) in file.specs:
        yield from file.chunks(_key(name, place), _BLOCK)
        return
    yield decode_ternary(_coded(file, name, place, columns[0]))


def _coded(file: SafetensorsFile, name: str, place: int | None, columns: int) -> Coded:
    import torch

    from upcycle.methods.compressing.qmoe_codec.codes import Coded

    codes, counts, scales = (file.read(_key(name, place, what)) for what in ("codes", "counts", "scales"))
    if scales.shape != (len(counts), 2):
        raise CheckpointError(f"tensor '{name}' has scales of shape {list(scales.shape)} for {len(counts)} rows")
    return Coded(codes.view(torch.uint16), counts.view(torch.uint16), scales, columns)
