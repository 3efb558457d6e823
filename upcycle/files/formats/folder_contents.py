"""Recognises, by names and first bytes, what a folder or file is that should be a checkpoint and is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from upcycle.errors import CheckpointError

LONGEST_SHOWN = 80  # characters of a name or value from a file that a message repeats
_MOST_LISTED = 3
# Listing stops at so many entries, so that a folder of a million files takes no time.
_MOST_ENTRIES = 10_000


@dataclass(frozen=True)
class _Kind:
    """One thing that a folder may hold: ``patterns`` of file names (as in ``Path.match``), what it is, and a hint for the user.

    In ``what``, ``{found}`` stands for the names that match.
    """

    patterns: tuple[str, ...]
    what: str
    hint: str


_MERGE = "merge it into its base model first: upcycle merge ADAPTER FOLDER, and name FOLDER"
_SAVE = "model.save_pretrained(FOLDER) with transformers, if you trust the weights, and convert FOLDER"
# The first kind of which something is found is the one that the message names.
_INSTEAD_OF_WEIGHTS = (
    _Kind(
        ("*.incomplete", "*.crdownload", "*.part", "*.aria2", "*.!qB"),
        "a download that has not finished ({found})",
        "let it finish, or download again: hf download REPOSITORY --local-dir FOLDER",
    ),
    _Kind(
        ("*.packed",),
        "packed weights ({found})",
        "write the model out first: upcycle unpack FOLDER OUT",
    ),
    _Kind(
        ("*.gguf",),
        "GGUF files ({found})",
        "name the .gguf file itself instead of its folder",
    ),
    _Kind(
        ("consolidated*.safetensors",),
        "weights in Mistral's own format ({found}: consolidated, with other names)",
        "use the repository's model*.safetensors, or convert them with transformers' convert_mistral_weights_to_hf.py",
    ),
    _Kind(
        ("consolidated*.pth",),
        "weights in Meta's own format ({found}: consolidated pickles)",
        "use the model's -hf repository, or convert them with transformers' convert_llama_weights_to_hf.py",
    ),
    _Kind(
        ("model-*-of-*.safetensors", "*-of-*.safetensors"),
        "shards of weights ({found}) without their index, model.safetensors.index.json",
        "download or copy the index too; without it, loaders cannot tell whether all shards are there",
    ),
    _Kind(
        ("*.onnx", "onnx"),
        "an ONNX export ({found})",
        "convert the PyTorch checkpoint that it was exported from",
    ),
    _Kind(
        ("*.h5", "*.ckpt.index", "saved_model.pb", "*.tflite"),
        "TensorFlow weights ({found})",
        "AutoModelForCausalLM.from_pretrained(FOLDER, from_tf=True) of transformers 4 reads them; save that as safetensors",
    ),
    _Kind(
        ("*.msgpack",),
        "Flax weights ({found})",
        "AutoModelForCausalLM.from_pretrained(FOLDER, from_flax=True) of transformers 4 reads them; save that as safetensors",
    ),
    _Kind(
        ("weights*.npz", "*.npz"),
        "MLX or NumPy weights ({found})",
        "convert the checkpoint that they were made from",
    ),
    _Kind(
        ("openvino_*.xml", "*.mlmodel", "*.mlpackage", "*.engine", "*.nemo", "*.llamafile"),
        "an export ({found})",
        "convert the checkpoint that it was made from",
    ),
    _Kind(
        ("*.distcp", "*.metadata", "global_step*", "pytorch_model_fsdp*", "zero_to_fp32.py"),
        "a training checkpoint in parts ({found})",
        "let the trainer that wrote it join it into safetensors first (zero_to_fp32.py for DeepSpeed, "
        "accelerate merge-weights for FSDP)",
    ),
    _Kind(
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"),
        "only pickle weights ({found}); loading them can run code",
        f"save it as safetensors: {_SAVE}",
    ),
    _Kind(
        ("*.safetensors",),
        "{found}, and no model.safetensors and no model.safetensors.index.json",
        "rename it to model.safetensors if it holds the whole model under the names of its stock class",
    ),
)
_WHOLE = (
    _Kind(
        ("model.safetensors", "model.safetensors.index.json"),
        "weights ({found})",
        "download or copy config.json too: hf download REPOSITORY config.json --local-dir FOLDER",
    ),
)
_INSTEAD_OF_A_MODEL = (
    _Kind(("model_index.json",), "a diffusion pipeline ({found})", "name a causal language model's folder"),
    _Kind(
        ("snapshots", "refs"),
        "a repository of the hub's cache ({found})",
        "name the hub id, or the folder below snapshots/",
    ),
    _Kind(
        ("params.json",),
        "a model in its maker's own format ({found}), and config.json is missing",
        "use the repository's Hugging Face files: config.json and model*.safetensors",
    ),
)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json", "merges.txt")


def shortened(value: object) -> str:
    """Return ``value`` as a message may repeat it: its text or repr, cut to ``LONGEST_SHOWN`` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def _names(folder: Path) -> list[str]:
    found = []
    for path in folder.iterdir():
        found.append(path.name)
        if len(found) == _MOST_ENTRIES:
            break
    return sorted(found)


def _matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(Path(name).match(pattern) for pattern in patterns)]


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_LISTED
    return ", ".join(map(shortened, names[:_MOST_LISTED])) + (f" and {rest} more" if rest > 0 else "")


def _recognised(folder: Path, names: list[str], kinds: tuple[_Kind, ...]) -> CheckpointError | None:
    for kind in kinds:
        if found := _matching(names, kind.patterns):
            return CheckpointError(f"{folder} holds {kind.what.format(found=_listed(found))}", hint=kind.hint)
    return None


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that loaders take for an adapter, even if it also holds a whole model.

    Raises:
        CheckpointError: the folder has an ``adapter_config.json`` or an adapter's weights.
    """
    found = [name for name in _ADAPTER if (folder / name).is_file()]
    if not found:
        return
    whole = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    beside = "; with peft installed, transformers would add it to the model that lies beside it" if whole else ""
    hint = f"{_MERGE}; or move the adapter's files out of the folder" if whole else _MERGE
    raise CheckpointError(f"{folder} holds a LoRA adapter, not a whole model ({_listed(found)}){beside}", hint=hint)


def no_config(folder: Path) -> CheckpointError:
    """Return the error for a folder without ``config.json``; it says what the folder holds instead."""
    try:
        refuse_adapter(folder)
    except CheckpointError as adapter:
        return adapter
    names = _names(folder)
    hint = "name the folder that holds config.json and the weights"
    below = [name for name in names if (folder / name / "config.json").is_file()]
    if below and not _matching(names, ("snapshots",)):
        return CheckpointError(
            f"{folder}: config.json is missing, and folders below have one ({_listed(below)})",
            hint=f"name the folder below: {folder / below[-1]}",
        )
    if error := _recognised(folder, names, (*_INSTEAD_OF_WEIGHTS[:4], *_INSTEAD_OF_A_MODEL)):
        return error
    if error := _recognised(folder, names, (*_WHOLE, *_INSTEAD_OF_WEIGHTS)):
        return CheckpointError(f"{error.message}, and config.json is missing", hint=error.hint)
    if found := _matching(names, _TOKENIZER):
        what = f"holds a tokenizer only ({_listed(found)}): config.json is missing, and so are the weights"
    else:
        what = (
            f"holds {_listed(names)}, and config.json is missing"
            if names
            else "is an empty folder: config.json is missing"
        )
    return CheckpointError(f"{folder} {what}", hint=hint)


def no_weights(folder: Path) -> CheckpointError:
    """Return the error for a folder without ``model.safetensors`` and without an index; it says what the folder holds instead."""
    names = _names(folder)
    if error := _recognised(folder, names, _INSTEAD_OF_WEIGHTS):
        return error
    below = sorted(name for name in names if any((folder / name).glob("model*.safetensors")))
    if below:
        return CheckpointError(
            f"{folder} holds no weights, and a folder below it does ({_listed(below)})",
            hint=f"name the folder below: {folder / below[-1]}",
        )
    what = "a tokenizer and no weights" if _matching(names, _TOKENIZER) else "no weights"
    return CheckpointError(
        f"{folder} holds {what}: no model.safetensors and no model.safetensors.index.json",
        hint="download the weights too: hf download REPOSITORY --local-dir FOLDER",
    )


_HUB = "hf download REPOSITORY --local-dir FOLDER"
# (first bytes in lower case, what the file is, hint)
_STARTS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, which says where the file is, and not the file itself",
        f"git lfs pull, or: {_HUB}",
    ),
    (b"<!doctype", "a web page", f"download the file itself: {_HUB}"),
    (b"<html", "a web page", f"download the file itself: {_HUB}"),
    (b"<?xml", "a web page or a server's answer", f"download the file itself: {_HUB}"),
    (
        b"pk\x03\x04",
        "a pickle or zip file under another name; loading it can run code",
        f"save it as safetensors: {_SAVE}",
    ),
    (b"\x80\x02", "a pickle under another name; loading it can run code", f"save it as safetensors: {_SAVE}"),
    (b"gguf", "a GGUF file under another name", "rename it to end in .gguf, and name it as the source"),
    (b"\x89hdf", "an HDF5 file (TensorFlow) under another name", f"save it as safetensors: {_SAVE}"),
    (b"\x1f\x8b", "compressed", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed", "unpack it first"),
    (b"bzh", "compressed", "unpack it first"),
    (b"\xfd7zxz", "compressed", "unpack it first"),
    (b"\x00" * 16, "zeros at its beginning: a download that has not finished", "download this file again"),
)


def something_else(path: Path) -> CheckpointError | None:
    """Return an error that says what a file is by its first bytes, where it should hold weights or settings; else None."""
    with path.open("rb") as file:
        start = file.read(64).lower()
    for begins, what, hint in _STARTS:
        if start.startswith(begins):
            return CheckpointError(f"{path} is {what}", hint=hint)
    return None
