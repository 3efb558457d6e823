"""Checkpoints: a local folder, a hub id, a ``.gguf`` file or the embedded demo, behind one interface."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.module_paths import find_module_paths
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.find_family import family_of
from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import CONFIG, SafetensorsFolder, read_config
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.locate import Source, locate

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.ffn.feed_forward import FeedForward

COPY_BLOCK_BYTES = 1 << 24
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


class TensorStore(Protocol):
    """Where tensors come from; shapes and dtypes are known without reading one."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor."""

    @property
    def fingerprint(self) -> str:
        """Different for different checkpoints."""

    def sample(self) -> str:
        """A hash of headers and of a few bytes of every tensor, as they are now."""

    def location(self, name: str) -> str:
        """The file a tensor is in."""

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Blocks of the first dimension, of a multiple of some rows each; ``part`` (first, count) of it only."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor whole."""


class Checkpoint:
    """A model's ``config.json`` and its tensors, none of which is read before it is asked for.

    Raises:
        CheckpointError: the folder or file is damaged.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.store: TensorStore
        if source.path.is_file():
            from upcycle.files.formats.gguf_file import GgufFile

            gguf = GgufFile(source.path)
            self.raw_config: dict[str, Any] = gguf.config
            config_bytes = b""
        else:
            self.raw_config = read_config(source.path)
            config_bytes = (source.path / CONFIG).read_bytes()
        self._identify()
        self.store = gguf if source.path.is_file() else SafetensorsFolder(source.path)
        if self.raw_config.get("tie_word_embeddings") is not False and self._has_another_head():
            self.raw_config = untied(self.raw_config)
        self._opened = self.version
        self.fingerprint = hashlib.sha256(config_bytes + self.store.fingerprint.encode()).hexdigest()

    def _has_another_head(self) -> bool:
        """Whether a head is stored that is not the embedding: stock transformers runs that one, whatever config.json says of
        tying.
        """
        import torch

        paths = find_module_paths(str(self.raw_config.get("model_type")))
        both = paths.embedding_weight, paths.head_weight
        if not set(both) <= set(self.store.specs):
            return False
        if len({self.store.specs[name].shape for name in both}) > 1:
            return True
        pairs = zip(*(self.store.chunks(name, COPY_BLOCK_BYTES) for name in both), strict=False)
        return not all(one.shape == two.shape and torch.equal(one.double(), two.double()) for one, two in pairs)

    def _identify(self) -> None:
        """Find out from the configuration what the model is, or refuse it, before the weights are looked at."""

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> Self:
        """Open what the user named: a folder, a ``.gguf`` file, a hub id or ``demo``."""
        return cls(locate(source, revision))

    @property
    def paths(self) -> list[Path]:
        """What is read: a folder or file per source."""
        return [self.source.path]

    @property
    def modified(self) -> list[int]:
        """When each weight file was last changed: a resumed conversion must not mix two versions of a source."""
        path = self.source.path
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        return [file.stat().st_mtime_ns for file in files]

    @property
    def version(self) -> list[Any]:
        """What tells one version of a source from another, even where it was replaced under the same time stamp and size:
        times, and a hash of the configuration, of headers, and of a few bytes of every tensor, as they are now.
        """
        config = self.source.path / CONFIG
        settings = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else ""
        return [self.modified, settings, self.store.sample()]

    @property
    def note(self) -> str | None:
        """What to tell a user of how tensors are read where the recipe keeps dtypes."""
        return getattr(self.store, "note", None)

    def check_unchanged(self) -> None:
        """Refuse to go on with a source that was replaced since it was opened.

        Raises:
            CheckpointError: a weight file has another modification time, or other bytes under the same.
        """
        if self.version != self._opened:
            raise CheckpointError(
                f"{self.source.path} changed while it was read",
                hint="start again with --restart once it stays as it is",
            )

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights."""
        if self.source.path.is_file():
            return bool(getattr(self.store, "has_tokenizer", False))
        return any((self.source.path / name).is_file() for name in _TOKENIZER_FILES)

    def dtype_of(self, name: str, dtype: str = "keep") -> str:
        """The dtype a tensor is read in."""
        return self.store.specs[name].dtype if dtype == "keep" else dtype

    def read(self, name: str, dtype: str = "keep") -> torch.Tensor:
        """Read one tensor, checked to be finite.

        Raises:
            CheckpointError: it holds NaN or Inf, or values that overflow ``dtype``.
        """
        return self._checked(name, self.store.read(name), dtype)

    def chunks(self, name: str, dtype: str = "keep", most_bytes: int = COPY_BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """The same in blocks of its first dimension."""
        return (self._checked(name, block, dtype) for block in self.store.chunks(name, most_bytes))

    def blocks(self, origin: Origin, dtype: str = "keep") -> Iterator[torch.Tensor]:
        """A tensor of the converted model, block by block, from where it comes from."""
        for block in self.store.chunks(origin.name, COPY_BLOCK_BYTES, origin.rows, origin.head):
            yield origin.apply(self._checked(origin.name, block, dtype))

    def whole(self, origin: Origin, dtype: str = "keep") -> torch.Tensor:
        """The same in one piece."""
        if origin.rows is None:
            return origin.apply(self.read(origin.name, dtype))
        size = self.store.specs[origin.name].nbytes
        (block,) = self.store.chunks(origin.name, max(size, 1), origin.rows, origin.head)
        return origin.apply(self._checked(origin.name, block, dtype))

    def _checked(self, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        import torch

        wanted = getattr(torch, self.dtype_of(name, dtype))
        if not tensor.numel():
            return tensor.to(wanted)
        # One pass without a temporary: aminmax passes NaN on, and Inf is an extreme.
        extremes = torch.stack(tensor.aminmax())
        if not extremes.isfinite().all():
            what = "NaN" if extremes.isnan().any() else "Inf"
            raise CheckpointError(
                f"{self.store.location(name)}: tensor '{name}' holds {what}",
                hint="the checkpoint is damaged or its training diverged; download it again or use an earlier one",
            )
        if not extremes.to(wanted).isfinite().all():
            most = extremes.double().abs().max().item()
            wider = "bfloat16 or float32" if wanted == torch.float16 else "float32"
            raise CheckpointError(
                f"{self.store.location(name)}: tensor '{name}' holds {most:.4g}, which overflows {dtype}",
                hint=f"--dtype {wider}"
                if wanted != torch.float32
                else "the values are beyond what a model computes with",
            )
        return tensor.to(wanted)


class DenseCheckpoint(Checkpoint):
    """A dense model: its family and read-out configuration too.

    Raises:
        CheckpointError: the folder or file is damaged or disagrees with its configuration.
        RefusalError: the family is not supported; the message says what is missing.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        where = source.path if source.path.is_file() else source.path / CONFIG
        self.config: DenseConfig = self.family.config(self.raw_config, str(where))
        self.family.check(self.config, self.store.specs, str(source.path), self.raw_config)
        self._longest_embedding: float | None = None

    def _identify(self) -> None:
        self.family: Family = family_of(self.raw_config, str(self.source.path))

    def feed_forward(self, layer: int, dtype: str = "keep") -> FeedForward:
        """Read one dense FFN."""
        from upcycle.ffn.feed_forward import FeedForward

        origins = self.family.ffn_origins(self.config, layer)
        matrices = self.family.ffn_dtype(self.config, self.store.specs, layer, dtype)
        tensors = {part: self.whole(origin, dtype if part == "norm" else matrices) for part, origin in origins.items()}
        if "norm" not in tensors:
            tensors["norm"] = self._stream_bound(layer, dtype)
        return FeedForward(layer=layer, activation=self.config.hidden_act, **tensors)

    def expert_matrices(self, layer: int, dtype: str = "keep") -> Callable[[int, str], torch.Tensor] | None:
        """Reads a matrix of one source's FFN, where there are several."""
        return None

    def _stream_bound(self, layer: int, dtype: str) -> torch.Tensor:
        """``[d]``, all the same ``b``: an FFN that reads the stream itself reads nothing longer than ``b sqrt(d)``.

        Everything in such a stream was normed before it was added: the longest embedding, then for every norm its largest
        weight, as a normed vector is no longer than ``sqrt(d)``.
        """
        import torch

        (name,) = self.family.first_specs(self.config)
        if self._longest_embedding is None:
            rows = (block.float().norm(dim=1).max().item() for block in self.blocks(Origin(name), dtype))
            self._longest_embedding = max(rows)
        bound = self._longest_embedding * self.config.embedding_multiplier / math.sqrt(self.config.hidden_size)
        for norm in self.family.norms_below(layer):
            bound += self.whole(self.family.origin(self.config, norm), dtype).abs().max().item()
        return torch.full((self.config.hidden_size,), bound)


def untied(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that says what its weights are: a head of their own. LFM2 has an older name for the key."""
    return {key: value for key, value in raw_config.items() if key != "tie_embedding"} | {"tie_word_embeddings": False}
