"""Opens models on disk (a local folder, a hub id, a ``.gguf`` file or the embedded demo) behind one interface."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.dense.widened import refuse_masked
from upcycle.architectures.module_paths import ModulePaths, find_module_paths
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.find_family import Tried, family_of
from upcycle.checkpoints.tensor_store import RenamedStore, TensorStore
from upcycle.errors import CheckpointError
from upcycle.files.formats.packed_folder import tensors_of
from upcycle.files.formats.tensor_files import CONFIG, read_config
from upcycle.files.formats.tensor_names import refuse_quantized
from upcycle.files.locate import Source, locate
from upcycle.files.locate_adapted import ADAPTER_CONFIG, ADAPTER_WEIGHTS, locate_adapted

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.adapters.adapted_store import AdaptedStore
    from upcycle.ffn.feed_forward import FeedForward
    from upcycle.files.formats.gguf_file import GgufFile

COPY_BLOCK_BYTES = 1 << 24
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class Checkpoint:
    """A model on disk: its ``config.json``, and its tensors, each of which is read when asked for.

    Where the source has a LoRA adapter, it is added to the tensors while they are read, and ``adapted`` is what adds it.

    Raises:
        CheckpointError: the folder or file is damaged.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.store: TensorStore
        self.adapted: AdaptedStore | None = None
        if source.path.is_file():
            from upcycle.files.formats.gguf_file import GgufFile

            gguf = GgufFile(source.path)
            self.raw_config: dict[str, Any] = gguf.config
            config_bytes = b""
        else:
            self.raw_config = read_config(source.path)
            config_bytes = (source.path / CONFIG).read_bytes()
        self._identify()
        self.store = self._named(gguf if source.path.is_file() else self._folder())
        if self.raw_config.get("tie_word_embeddings") is not False and self._has_another_head():
            self.raw_config = untied(self.raw_config)
        self._opened = self.version
        self.fingerprint = hashlib.sha256(config_bytes + self.store.fingerprint.encode()).hexdigest()

    def _folder(self) -> TensorStore:
        """Return the tensors of the source's folder, with its adapter, if it has one."""
        refuse_masked(self.source.path, self.source.name)
        stored = tensors_of(self.source.path, self.raw_config)
        if self.source.adapter is None:
            return stored
        from upcycle.adapters.adapted_store import AdaptedStore
        from upcycle.adapters.folder import AdapterFolder

        refuse_quantized(stored.specs, self.raw_config, str(self.source.path))
        self.adapted = AdaptedStore(stored, AdapterFolder(self.source.adapter), self.raw_config, str(self.source.path))
        return self.adapted

    def _has_another_head(self) -> bool:
        """Return whether a head is stored that differs from the embedding.

        Stock transformers then runs that head, whatever config.json says about tying.
        """
        import torch

        paths = self._module_paths
        both = paths.embedding_weight, paths.head_weight
        if not set(both) <= set(self.store.specs):
            return False
        if len({self.store.specs[name].shape for name in both}) > 1:
            return True
        pairs = zip(*(self.store.chunks(name, COPY_BLOCK_BYTES) for name in both), strict=False)
        return not all(one.shape == two.shape and torch.equal(one.double(), two.double()) for one, two in pairs)

    @property
    def _module_paths(self) -> ModulePaths:
        return find_module_paths(str(self.raw_config.get("model_type")))

    def _identify(self) -> None:
        """Find out from the configuration what the model is, or refuse it, before the weights are opened."""

    def _named(self, store: TensorStore) -> TensorStore:
        """Return the store with the names by which this checkpoint calls its tensors."""
        return store

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> Self:
        """Open the source that the user named: a folder, a ``.gguf`` file, a hub id or ``demo``."""
        return cls(locate(source, revision))

    @property
    def paths(self) -> list[Path]:
        """The folders and files that are read, one per source."""
        return [self.source.path, *([self.source.adapter] if self.source.adapter else [])]

    @property
    def modified(self) -> list[int]:
        """The modification time of each weight file, in nanoseconds."""
        path = self.source.path
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if self.source.adapter:
            files += [self.source.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        return [file.stat().st_mtime_ns for file in files]

    @property
    def version(self) -> list[Any]:
        """What tells versions of a source apart, so that a conversion that continues does not mix two of them.

        It consists of modification times and hashes of the configuration, of headers, and of a few bytes of every tensor, as
        they are now; so it changes even if files are replaced by others with the same time stamp and size.
        """
        config = self.source.path / CONFIG
        settings = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else ""
        return [self.modified, settings, self.store.sample()]

    def note(self, dtype: str) -> str | None:
        """Return a note for the user on how tensors are read where a recipe says ``dtype``, or None."""
        note = getattr(self.store, "note", None)
        return note if dtype == "keep" or isinstance(self.store, RenamedStore) else None

    def check_unchanged(self) -> None:
        """Check that the source is the one that was opened.

        Raises:
            CheckpointError: a file has another modification time, or other bytes.
        """
        if self.version != self._opened:
            raise CheckpointError(
                f"{self.source.path} changed while it was read",
                hint="run the command again with --restart once nothing changes it any more",
            )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint has a tokenizer."""
        if self.source.path.is_file():
            return bool(getattr(self.store, "has_tokenizer", False))
        return any((self.source.path / name).is_file() for name in _TOKENIZER_FILES)

    def dtype_of(self, name: str, dtype: str = "keep") -> str:
        """Return the name of the dtype in which a tensor is read: ``dtype``, or for ``keep`` the stored one."""
        return self.store.specs[name].dtype if dtype == "keep" else dtype

    def read(self, name: str, dtype: str = "keep") -> torch.Tensor:
        """Return one whole tensor in ``dtype`` (``keep``: as stored), after checking that it is finite.

        Raises:
            CheckpointError: it holds NaN or Inf, or values that overflow ``dtype``.
        """
        return self._checked(name, self.store.read(name), dtype)

    def chunks(self, name: str, dtype: str = "keep", most_bytes: int = COPY_BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """Yield a tensor as blocks of its first dimension, converted and checked as by :meth:`read`."""
        return (self._checked(name, block, dtype) for block in self.store.chunks(name, most_bytes))

    def blocks(self, origin: Origin, dtype: str = "keep") -> Iterator[torch.Tensor]:
        """Yield a tensor of the converted model as blocks, made from the tensor of this checkpoint that ``origin`` names."""
        if origin.filled:
            yield self._filled(origin, dtype)
            return
        for block in self.store.chunks(origin.name, COPY_BLOCK_BYTES, origin.rows, origin.head):
            yield origin.apply(self._checked(origin.name, block, dtype))

    def whole(self, origin: Origin, dtype: str = "keep") -> torch.Tensor:
        """Return a tensor of the converted model whole, made from the tensor of this checkpoint that ``origin`` names."""
        if origin.filled:
            return self._filled(origin, dtype)
        if origin.rows is None:
            return origin.apply(self.read(origin.name, dtype))
        size = self.store.specs[origin.name].nbytes
        (block,) = self.store.chunks(origin.name, max(size, 1), origin.rows, origin.head)
        return origin.apply(self._checked(origin.name, block, dtype))

    def _filled(self, origin: Origin, dtype: str) -> torch.Tensor:
        import torch

        assert origin.filled
        return torch.full(*origin.filled, dtype=getattr(torch, self.dtype_of(origin.name, dtype)))

    def _checked(self, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        import torch

        wanted = getattr(torch, self.dtype_of(name, dtype))
        if not tensor.numel():
            return tensor.to(wanted)
        # One pass without a temporary tensor: aminmax returns NaN if there is one, and Inf is an extreme.
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
                else "no dtype that models compute in holds such values",
            )
        return tensor.to(wanted)


class DenseCheckpoint(Checkpoint):
    """A dense model on disk, with its family and the configuration that the family reads.

    Raises:
        CheckpointError: the folder or file is damaged, or disagrees with its configuration.
        RefusalError: the family is not supported; the message says why.
    """

    def __init__(self, source: Source, tried: Tried | None = None, parts: tuple[str, ...] = ()) -> None:
        self._tried, self._parts = tried, parts
        super().__init__(source)
        where = source.path if source.path.is_file() else source.path / CONFIG
        config = self.family.config(self.raw_config, str(where))
        self.config: DenseConfig = self.family.spelt(config, self._spelling)
        self.family.check(self.config, self.store.specs, str(source.path), self.raw_config)
        self._longest_embedding: float | None = None

    @classmethod
    def open(
        cls,
        source: str,
        revision: str | None = None,
        tried: Tried | None = None,
        parts: tuple[str, ...] = (),
        adapters: bool = False,
    ) -> Self:
        """Open the source that the user named; see :meth:`Checkpoint.open`.

        Args:
            source: a folder, a ``.gguf`` file, a hub id or ``demo``.
            revision: of the hub.
            tried: reads the configuration of a model that nobody described.
            parts: those of a model of parts that are converted; empty: its text model.
            adapters: whether the source may also be a LoRA folder, or ``MODEL+ADAPTER``. What reads the folder of the source itself,
                and not through this checkpoint, would miss the adapter.
        """
        return cls((locate_adapted if adapters else locate)(source, revision), tried, parts)

    def _identify(self) -> None:
        self.family: Family = family_of(self.raw_config, str(self.source.path), self._tried, self._parts)
        self._spelling: dict[str, str] = {}  # the stored names of tensors that have other names here

    @property
    def _module_paths(self) -> ModulePaths:
        return self.family.module_paths

    def _named(self, store: TensorStore) -> TensorStore:
        if self.source.path.is_file():
            gguf = cast("GgufFile", store)
            gguf.name_tensors(list(self.family.all_stored_specs(self.family.config(self.raw_config, str(gguf.path)))))
            return gguf
        self._spelling = self.family.stock_names(self.raw_config, store.specs)
        return RenamedStore(store, self._spelling) if self._spelling else store

    def note(self, dtype: str) -> str | None:
        """Return notes for the user on how tensors are read where a recipe says ``dtype``, and on the family; None: none."""
        return "; ".join(filter(None, (super().note(dtype), self.family.remark))) or None

    def feed_forward(self, layer: int, dtype: str = "keep") -> FeedForward:
        """Return the FFN of a layer, with its matrices in ``dtype``, or for ``keep`` in one dtype that holds all of them."""
        from upcycle.ffn.feed_forward import FeedForward

        origins = self.family.ffn_origins(self.config, layer)
        matrices = self.family.ffn_dtype(self.config, self.store.specs, layer, dtype)
        own = ("norm", "norm_bias")
        tensors = {part: self.whole(origin, dtype if part in own else matrices) for part, origin in origins.items()}
        if "norm" not in tensors:
            tensors["norm"] = self._stream_bound(layer, dtype)
        gate = tensors.pop("gate", None)
        return FeedForward(layer=layer, gate=gate, activation=self.config.at(layer).hidden_act, **tensors)

    def expert_matrices(self, layer: int, dtype: str = "keep") -> Callable[[int, str], torch.Tensor] | None:
        """Return a function that reads a matrix (``gate``, ``up`` or ``down``) of a source's FFN; None with a single source."""
        return None

    def _stream_bound(self, layer: int, dtype: str) -> torch.Tensor:
        """Return ``[d]`` equal numbers ``b``, so that an FFN without a norm before it reads no vector longer than ``b sqrt(d)``.

        Everything in such a residual stream was normed before it was added, and a normed vector is no longer than ``sqrt(d)``.
        So the bound is that of the longest embedding plus the largest weight of every norm below.
        """
        import torch

        if not self.family.reads_a_norm(layer):
            return torch.ones(self.config.at(layer).hidden_size)
        (name,) = self.family.first_specs(self.config)
        if self._longest_embedding is None:
            rows = (block.float().norm(dim=1).max().item() for block in self.blocks(Origin(name), dtype))
            self._longest_embedding = max(rows)
        bound = self._longest_embedding * self.config.embedding_multiplier / math.sqrt(self.config.hidden_size)
        for norm in self.family.norms_below(layer):
            bound += self.whole(self.family.origin(self.config, norm), dtype).abs().max().item()
        return torch.full((self.config.at(layer).hidden_size,), bound)


def untied(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` that says that the head is not tied to the embedding. LFM2 has an older name for the key."""
    kept = {key: value for key, value in raw_config.items() if key != "tie_embedding"} | {"tie_word_embeddings": False}
    inner = raw_config.get("text_config")  # some models of parts tie if either says so
    return kept | ({"text_config": untied(inner)} if isinstance(inner, Mapping) else {})
