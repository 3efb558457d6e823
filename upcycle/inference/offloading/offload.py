"""Loads a MoE that does not fit in memory: its experts stay in its files, and those that are used most lately in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from upcycle.architectures.clean_settings import CONFIG, clean_file
from upcycle.architectures.stock import build_config, empty_model, generation_settings
from upcycle.architectures.stock_auto import is_encoder, is_encoder_decoder
from upcycle.errors import RefusalError, UsageError
from upcycle.files.formats.packed_folder import is_packed
from upcycle.files.formats.tensor_files import SafetensorsFolder, read_config
from upcycle.files.formats.tensor_names import is_block_fp8
from upcycle.files.locate import locate
from upcycle.formatting import size
from upcycle.hardware.memory import available_memory
from upcycle.inference.offloading.device_reader import DeviceReader
from upcycle.inference.offloading.expected_experts import ExpectedExperts
from upcycle.inference.offloading.expert_cache import ExpertCache
from upcycle.inference.offloading.expert_files import SLACK, ExpertFiles
from upcycle.inference.offloading.expert_layout import NOT_OFFLOADED_HINT, StoredExperts, find_experts, is_left_in_files
from upcycle.inference.offloading.fetched_weights import Scratch, put_in_place
from upcycle.inference.offloading.loading import Loader
from upcycle.models.experts import use_eager_experts
from upcycle.models.stock_layers import FolderLayers

_FEW_TOKENS = 4  # of more, the experts that a guess names are those of too many tokens


@dataclass(frozen=True)
class Budget:
    """Describes how a memory cap is spent, in bytes.

    Attributes:
        resident: everything but routed experts, and the memory in which matrices are widened.
        expert: one expert.
        places: how many experts each layer keeps.
        ahead: how many can be on their way beside them.
    """

    resident: int
    expert: int
    places: tuple[int, ...]
    ahead: int

    @property
    def total(self) -> int:
        """All of it: what is never exceeded."""
        return self.resident + self.expert * (sum(self.places) + self.ahead)

    @classmethod
    def of(cls, memory: int, resident: int, expert: int, counts: list[int], top_k: int, name: str) -> Budget:
        """Spend ``memory`` on layers with so many experts (``counts``) each.

        Up to an eighth of it, and at most two tokens' experts, is for those on their way; every layer keeps as many of the rest.

        Raises:
            UsageError: there is no room for one expert of every layer.
        """
        needed, layers = resident + expert * len(counts), len(counts)
        if memory < needed:
            raise UsageError(
                f"{name} needs at least {size(needed)} of memory: {size(resident)} for everything but its experts, and "
                f"{size(expert)} for one expert in each of {layers} layers; --memory allows {size(memory)}",
                hint=f"--memory {-(-needed // 1_000_000)}MB, or more: what is left keeps experts",
            )
        buffers = (memory - resident) // expert
        ahead = min(2 * top_k, max(1, buffers // 8), buffers - layers)
        rest = buffers - ahead
        places = [min(count, rest // layers) for count in counts]
        for layer in range(layers):
            if sum(places) < rest and places[layer] < counts[layer]:
                places[layer] += 1
        return cls(resident, expert, tuple(places), ahead)


class OffloadedModel:
    """A stock model whose routed experts stay in the checkpoint's files; a context manager.

    Attributes:
        model: the stock model, in fp32. Its ``generate`` and its logits are those of the whole model with eager experts.
        budget: how the memory is spent.
        cache: the experts that are in memory.
        reader: what was read.
    """

    def __init__(
        self,
        source: str | Path,
        memory: int,
        device: torch.device | None = None,
        prefetch: bool = True,
        keep_pages: bool | None = None,
        threads: int = 2,
        host_memory: int = 0,
    ) -> None:
        name, folder = str(source), source if isinstance(source, Path) else locate(source).path
        device = device or torch.device("cpu")
        _refuse_others(folder, name)
        layers, resident = _measure(folder, name)
        scratch = Scratch(layers, torch.float32, device)
        nbytes = max(one.nbytes for layer in layers for one in layer.experts)
        top_k = _top_k(layers)
        counts = [len(layer.experts) for layer in layers]
        self.budget = Budget.of(memory, resident + scratch.nbytes, nbytes + SLACK, counts, top_k, name)
        held = FolderLayers(folder, left_out=is_left_in_files)
        for index in range(len(held)):
            held.load(index)
        self.model: Any = use_eager_experts(held.model)
        if (settings := generation_settings(folder)) is not None:
            self.model.generation_config = settings
        self._expected = ExpectedExperts(self.model, [layer.path for layer in layers])
        self._prefetch = prefetch
        if keep_pages is None:
            whole = sum(one.stored_bytes for layer in layers for one in layer.experts)
            keep_pages = whole + memory < available_memory()
        self._files = ExpertFiles(layers, keep_pages)
        self._loader = Loader(threads)
        self.reader = DeviceReader(self._files, nbytes, device, host_memory)
        self.cache = ExpertCache(
            self.budget.places, self.budget.ahead, self.reader.make_buffer, self.reader, self._loader
        )
        for index, layer in enumerate(layers):
            layer.module = self.model.get_submodule(layer.path)
            self._attach(index, layer, scratch)
        self.model.requires_grad_(False).to(device)

    def _attach(self, index: int, layer: StoredExperts, scratch: Scratch) -> None:
        cache, experts = self.cache, len(layer.experts)

        def begin(state: torch.Tensor, chosen: torch.Tensor) -> None:
            state = state.reshape(-1, state.shape[-1])
            chosen = chosen.reshape(len(state), -1)
            cache.begin(index, last_uses(chosen, experts), len(state))
            if self._prefetch and len(state) <= _FEW_TOKENS:
                cache.guess(index + 1, self._expected.of(index + 1, state))

        put_in_place(layer, lambda e: cache.fetch(index, e), begin, lambda: cache.end(index), scratch)

    def facts(self) -> dict[str, Any]:
        """Return what was found where so far, as plain data."""
        cache, budget = self.cache, self.budget
        return {
            "memory_bytes": budget.total,
            "resident_bytes": budget.resident,
            "expert_bytes": budget.expert,
            "kept_per_layer": min(budget.places),
            "ahead": budget.ahead,
            "prompt": asdict(cache.prompt),
            "written": asdict(cache.written),
            "wrong_guesses": cache.wrong_guesses,
            "bytes_read": self.reader.bytes_read,
            "bytes_copied": self.reader.bytes_copied,
        }

    def close(self) -> None:
        """Stop loading, and close the files."""
        self._loader.close()
        self._files.close()

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def last_uses(chosen: torch.Tensor, experts: int) -> dict[int, int]:
    """Return the experts that tokens ``[T, K]`` chose, ascending, with the last token that chose each."""
    if len(chosen) == 1:
        return {expert: 0 for expert in sorted(set(chosen[0].tolist())) if expert < experts}
    last = torch.full((experts + 1,), -1)  # where another device computes, ids may be one too high for "no expert"
    tokens = torch.arange(len(chosen)).repeat_interleave(chosen.shape[1])
    last.scatter_reduce_(0, chosen.flatten().cpu(), tokens, "amax")
    return {expert: token for expert, token in enumerate(last[:experts].tolist()) if token >= 0}


def offload(
    moe: str | Path,
    memory: str | int,
    device: str | None = None,
    prefetch: bool = True,
    keep_pages: bool | None = None,
    threads: int = 2,
    host_memory: str | int = 0,
) -> OffloadedModel:
    """Load a MoE with its routed experts left in its files, and at most ``memory`` of its weights in memory.

    Args:
        moe: a local folder or hub id, with safetensors weights.
        memory: the cap on weights in memory, e.g. ``4GB``: what is always resident, and the experts that are kept. The interpreter
            with its libraries (about 0.5 GB), activations and the attention cache come on top.
        device: where it runs; default: the CPU.
        prefetch: fetch the experts that the next layer will probably need ahead.
        keep_pages: let the system keep what was read in its page cache; default: where the whole model would fit in what is free.
        threads: how many experts are read at the same time in the background.
        host_memory: with another device, how much of the host's memory keeps experts.

    Raises:
        UsageError: the cap is too low, or no size.
        RefusalError: the model is dense, or its experts cannot be read one by one.
        CheckpointError: the files are damaged.
    """
    from upcycle.recipe.conversion_recipe import parse_size

    try:
        sizes = [one if isinstance(one, int) else parse_size(one) for one in (memory, host_memory)]
    except ValueError as error:
        raise UsageError(f"memory: {error}", hint="--memory 4GB") from None
    where = None if device is None else torch.device(device)
    return OffloadedModel(moe, sizes[0], where, prefetch, keep_pages, threads, sizes[1])


def _refuse_others(folder: Path, name: str) -> None:
    if folder.is_file():
        raise RefusalError(
            f"{name} is one file, and experts can stay in safetensors files alone", hint=NOT_OFFLOADED_HINT
        )
    raw = clean_file(folder / CONFIG) if (folder / CONFIG).is_file() else read_config(folder)
    if is_encoder(raw) or is_encoder_decoder(raw):
        raise RefusalError(f"{name} is no model that continues a text, and others are not run with experts in files")
    if is_packed(read_config(folder)):
        raise RefusalError(
            f"{name} is stored in few bits, and its experts cannot stay in its files yet", hint=NOT_OFFLOADED_HINT
        )
    if is_block_fp8(raw):
        raise RefusalError(
            f"{name} is stored in FP8, and its experts cannot stay in its files yet", hint=NOT_OFFLOADED_HINT
        )


def _measure(folder: Path, name: str) -> tuple[list[StoredExperts], int]:
    """Return where the experts are, and the bytes in fp32 of everything else; no weight is read."""
    store = SafetensorsFolder(folder)
    model = empty_model(build_config(clean_file(folder / CONFIG), name), name, torch.float32)
    layers = find_experts(model, store, name)
    tied = set(model.all_tied_weights_keys)
    held = [
        weight
        for key, weight in (*model.named_parameters(), *model.named_buffers())
        if key not in tied and not is_left_in_files(key)
    ]
    return layers, sum(weight.nbytes for weight in held)


def _top_k(layers: list[StoredExperts]) -> int:
    """Return how many experts a token has, as far as the configuration says: at most what is sent for ahead depends on it."""
    config = getattr(layers[0].module, "config", None)
    said = [getattr(config, key, None) for key in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")]
    return next((k for k in said if isinstance(k, int)), 2)
