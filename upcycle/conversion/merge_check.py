"""Compares a merged model with its base and the adapter beside each other, by the logits of both in fp32.

The unmerged side is stock transformers' own model of the base. The low-rank products run beside its weights where they can, and
all other changes are made to its weights by PEFT's formulas, written out once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.adapters.live import LowRankPair, attach
from upcycle.adapters.places import LowRankChange, StockPlaces, changes, replaced
from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock import load_stock_model, load_tokenizer
from upcycle.errors import EnvironmentFault
from upcycle.hardware.memory import available_memory
from upcycle.models.experts import use_experts
from upcycle.text.windows import demo_parts, encode, windows_of

if TYPE_CHECKING:
    from upcycle.adapters.folder import AdapterFolder

TOLERANCE = 1e-5
_TOKENS, _WINDOW = 256, 128
_MOST_MEMORY = 0.9


@dataclass(frozen=True)
class MergeCheck:
    """The relative error of the merged logits against the unmerged ones, ``||merged - unmerged|| / ||unmerged||``.

    ``rounding_error`` is the part that rounding the sums to the stored dtype makes by itself: 0 in fp32. ``error`` is against the
    unmerged model whose changed weights are rounded alike, and must be below ``tolerance``. ``change`` says how far the adapter
    moves the base's logits.
    """

    error: float
    rounding_error: float
    change: float
    tolerance: float
    tokens: int

    @property
    def holds(self) -> bool:
        """Whether the merged model is the unmerged one."""
        return self.error < self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def too_large(parameters: int) -> str | None:
    """Return why a model of so many parameters cannot be compared here; None: it can."""
    needed, free = 4 * parameters, available_memory()
    if needed <= _MOST_MEMORY * free:
        return None
    return f"it takes {needed / 1e9:,.0f} GB in memory, and {free / 1e9:,.0f} GB are available"


def check_merge(
    base: Path, folder: Path, adapter: AdapterFolder, stock: StockPlaces, dtypes: dict[str, str], dtype: str = "keep"
) -> MergeCheck:
    """Run the base with the adapter beside it, and the merged folder, on the same text.

    Args:
        base: the folder of the base.
        folder: the merged one.
        adapter: the LoRA folder.
        stock: the base's parameters.
        dtypes: the dtype in which each changed parameter is stored, by its name in the stock class.
        dtype: the dtype to which all others were rounded, too; ``keep``: they are as they were.
    """
    model = _loaded(base)
    ids = _ids(base, model)
    plain = _logits(model, ids)
    unmerged = _logits(with_adapter(model, adapter, stock), ids)
    rounded = unmerged
    if set(dtypes.values()) != {"float32"}:
        del model
        model = _loaded(base)
        write_adapted(model, adapter, stock, dtypes=dtypes)
        if dtype != "keep":
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(getattr(torch, dtype)))
        rounded = _logits(model, ids)
    del model
    merged = _logits(_loaded(folder), ids)
    return MergeCheck(
        error=_relative(merged, rounded),
        rounding_error=_relative(rounded, unmerged),
        change=_relative(unmerged, plain),
        tolerance=TOLERANCE,
        tokens=ids.numel(),
    )


def with_adapter(model: Any, adapter: AdapterFolder, stock: StockPlaces) -> Any:
    """Return the model with the adapter beside its weights, as far as it consists of whole pairs; the rest is written into them."""
    whole = replaced(adapter, stock)
    pairs: dict[str, LowRankPair] = {}
    for change in changes(adapter, stock):
        name = change.place.parameter
        only_written = (
            name in whole or change.place.expert is not None or change.pair.magnitude or change.pair.embedding
        )
        if only_written:
            continue
        pair = LowRankPair(model.get_parameter(name), change.rank, change.scale, change.transposed)
        with torch.no_grad():
            a, b = (adapter.file.read(half).float() for half in (change.pair.a, change.pair.b))
            if change.experts:
                a, b = _by_expert(a, b, change)
            pair.a.copy_(a)
            pair.b.copy_(b)
        pairs[name] = pair
    write_adapted(model, adapter, stock, beside=pairs)
    attach(model, pairs)
    return model


def write_adapted(
    model: Any,
    adapter: AdapterFolder,
    stock: StockPlaces,
    beside: Collection[str] = (),
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write what the adapter changes into a model, by PEFT's formulas in fp64, one parameter or buffer at a time.

    Args:
        model: the base's stock model.
        adapter: the LoRA folder.
        stock: the base's parameters.
        beside: names that stay as they are.
        dtypes: what each is rounded to; None: to the model's own dtype.
    """
    whole, held = replaced(adapter, stock), model.state_dict()  # which share the model's memory
    added: dict[str, list[LowRankChange]] = {name: [] for name in whole}
    for change in changes(adapter, stock):
        added.setdefault(change.place.parameter, []).append(change)
    for name, found in added.items():
        if name in beside:
            continue
        weight = (adapter.file.read(whole[name]) if name in whole else held[name]).to(torch.float64, copy=True)
        for change in found:
            _change(weight, change, adapter)
        held[name].copy_(weight.to(getattr(torch, dtypes[name])) if dtypes else weight)


def _change(weight: torch.Tensor, change: LowRankChange, adapter: AdapterFolder) -> None:
    """Make one change to a whole parameter, fp64, in place."""
    pair = change.pair
    a, b = adapter.file.read(pair.a).double(), adapter.file.read(pair.b).double()
    if change.experts:
        a, b = _by_expert(a, b, change)
        delta = torch.einsum("eor,eri->eio" if change.transposed else "eor,eri->eoi", b, a)
    else:
        delta = (b @ a).T if change.transposed else b @ a
    if change.place.expert is not None:
        first = change.place.first
        weight[change.place.expert, first : first + len(delta)] += change.scale * delta
    else:
        weight += change.scale * delta
    if pair.magnitude:
        lengths = adapter.file.read(pair.magnitude).double().view(-1, 1)
        weight *= lengths / weight.norm(dim=1, keepdim=True)


def _by_expert(a: torch.Tensor, b: torch.Tensor, change: LowRankChange) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PEFT's A ``[E r, in]`` and B ``[out, r E]`` as ``[E, r, in]`` and ``[E, out, r]``."""
    count = change.experts
    return a.unflatten(0, (count, change.rank)), b.unflatten(1, (change.rank, count)).permute(2, 0, 1)


def _loaded(folder: Path) -> Any:
    model = load_stock_model(folder, torch.float32, surplus=True).eval().requires_grad_(False)
    use_experts(model, "eager")
    return model


def _ids(folder: Path, model: Any) -> torch.Tensor:
    """Return token ids ``[N, W]``: of an embedded text, or random ones where there is no tokenizer that fits."""
    vocabulary = text_config(model.config).vocab_size
    window = min(_WINDOW, getattr(text_config(model.config), "max_position_embeddings", None) or _WINDOW)
    try:
        ids = windows_of([encode(load_tokenizer(folder), demo_parts("prose")[1])], _TOKENS, window)
        if int(ids.max()) < vocabulary:
            return ids
    except EnvironmentFault:
        pass
    return torch.randint(vocabulary, (max(1, _TOKENS // window), window), generator=torch.Generator().manual_seed(0))


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids)[0]
    return found.double()


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
