"""Opens a LoRA folder as PEFT writes it: pairs of low-rank matrices, and tensors that replace those of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from upcycle.adapters.settings import LoraSettings, read_settings
from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.files.hashing import hash_file
from upcycle.files.locate_adapted import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB])(\.weight)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(\.weight)?")
_DEPTH = ".base_layer"


@dataclass(frozen=True)
class Pair:
    """The names of one target's tensors in the file: ``A`` ``[r, in]``, ``B`` ``[out, r]``, and with DoRA the lengths of rows.

    Attributes:
        path: the module's dotted path in the base model.
        depth: how many wrappers lie around this one: PEFT nests them where several parameters of one module are targets.
        embedding: whether it belongs to an embedding, whose matrix is the product's transpose.
    """

    path: str
    depth: int
    a: str
    b: str
    embedding: bool = False
    magnitude: str | None = None


class AdapterFolder:
    """A LoRA folder: its settings, and its tensors by what they are.

    Raises:
        CheckpointError: a file is missing or damaged, or a matrix lacks its other half.
        RefusalError: it cannot be added to weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: LoraSettings = read_settings(folder)
        path = folder / ADAPTER_WEIGHTS
        if not path.is_file():
            pickled = next((p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth")), None)
            raise CheckpointError(
                f"{folder} has no {ADAPTER_WEIGHTS}"
                + (f", only {pickled}, and loading a pickle can run code" if pickled else ""),
                hint="save it as safetensors with peft, if you trust the weights: model.save_pretrained(FOLDER)",
            )
        self.file = SafetensorsFile(path)
        self.pairs: list[Pair] = []
        self.whole: dict[str, str] = {}  # the base's parameter -> the tensor in the file that replaces it
        self._sort()

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights, by which a merged model says what was added to it."""
        return hash_file(self.file.path)

    @property
    def fingerprint(self) -> str:
        """What tells versions of the folder apart at little cost: its settings, its header, and a few bytes of every tensor."""
        return f"{hash_file(self.folder / ADAPTER_CONFIG)} {self.file.size} {self.file.sample()}"

    def check_finite(self) -> None:
        """Read all tensors, one by one.

        Raises:
            CheckpointError: one holds NaN or Inf.
        """
        for name in self.file.specs:
            if not self.file.read(name).isfinite().all():
                raise CheckpointError(
                    f"{self.file.path}: tensor '{shortened(name)}' holds NaN or Inf",
                    hint="its training diverged, or the file is damaged; use an earlier adapter",
                )

    def _sort(self) -> None:
        found: dict[tuple[str, int], dict[str, str]] = {}
        for name in self.file.specs:
            plain = name.removeprefix(_PREFIX)
            if match := _FACTOR.fullmatch(plain):
                found.setdefault(_place(match[1]), {})[match[2]] = name
            elif match := _MAGNITUDE.fullmatch(plain):
                found.setdefault(_place(match[1]), {})["magnitude"] = name
            elif ".lora_" in plain:
                raise RefusalError(
                    f"{self.file.path}: tensor '{shortened(name)}' is of a kind that cannot be added to weights",
                    hint="only lora_A, lora_B, their embedding's, and lora_magnitude_vector are",
                )
            else:
                self.whole[plain.replace(_DEPTH, "")] = name
        for (path, depth), parts in found.items():
            self.pairs.append(self._pair(path, depth, parts))
        if not self.pairs and not self.whole:
            raise CheckpointError(f"{self.file.path} holds no tensor", hint="copy the adapter's folder again")

    def _pair(self, path: str, depth: int, parts: Mapping[str, str]) -> Pair:
        halves = {key for key in parts if key != "magnitude"}
        if halves not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
            raise CheckpointError(
                f"{self.file.path}: '{shortened(path)}' has {' and '.join(sorted(parts))}, and a pair of matrices is needed",
                hint="copy the adapter's folder again",
            )
        if ("magnitude" in parts) != self.settings.dora:
            missing, said = ("no ", "true") if self.settings.dora else ("a ", "false")
            raise CheckpointError(
                f"{self.file.path}: '{shortened(path)}' has {missing}lora_magnitude_vector, and 'use_dora' of its settings is {said}",
                hint="the two files are not of one adapter: copy its folder again",
            )
        first, second = sorted(halves)
        return Pair(path, depth, parts[first], parts[second], "embedding" in first, parts.get("magnitude"))


def _place(path: str) -> tuple[str, int]:
    return path.replace(_DEPTH, ""), path.count(_DEPTH)
