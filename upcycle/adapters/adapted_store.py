"""Gives the tensors of a base model with a LoRA folder added to them, block by block, while they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from upcycle.adapters.folder import AdapterFolder
from upcycle.adapters.places import LowRankChange, StockPlace, StockPlaces, changes, replaced, unplaced
from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import row_blocks
from upcycle.files.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

GRID_BYTES = 1 << 24  # of the fp64 products that are made at once
_KEPT = 4  # pairs of matrices in memory


class _Base(Protocol):
    """What is read of a base: see :class:`upcycle.checkpoints.tensor_store.TensorStore`, which is above this room."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def fingerprint(self) -> str: ...

    def sample(self) -> str: ...

    def location(self, name: str) -> str: ...

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]: ...


class AdaptedStore:
    """A :class:`~upcycle.checkpoints.tensor_store.TensorStore` of ``W + scale B A``, computed in fp64 and rounded once.

    Products are made on a fixed grid of rows, so that a tensor has the same bits however it is divided into blocks.

    Args:
        base: the base's tensors, by their stored names, in full precision.
        adapter: the LoRA folder.
        raw: the base's ``config.json``.
        where: the base, for messages.
        dtype: the dtype of the tensors that are given; ``keep``: as stored.

    Raises:
        CheckpointError: the folder does not fit the base.
        RefusalError: the base is one to which nothing can be added.
    """

    def __init__(
        self, base: _Base, adapter: AdapterFolder, raw: Mapping[str, Any], where: str, dtype: str = "keep"
    ) -> None:
        self._base, self.adapter = base, adapter
        self.specs: Mapping[str, TensorSpec] = {
            name: spec if dtype == "keep" else TensorSpec(spec.shape, dtype) for name, spec in base.specs.items()
        }
        stock = StockPlaces(raw, {name: spec.shape for name, spec in base.specs.items()}, where)
        self.stock, self._places = stock, stock.places
        self._replaced = replaced(adapter, stock)
        self._changes: dict[str, list[LowRankChange]] = {}
        for change in changes(adapter, stock):
            self._changes.setdefault(change.place.parameter, []).append(change)
        if lost := unplaced((*self._replaced, *self._changes), stock):
            raise CheckpointError(
                f"{adapter.folder} changes '{lost[0]}', and {where} stores no tensor that becomes it by renaming and stacking",
                hint="load the base with transformers, save it again, and name the new folder: --base FOLDER",
            )
        self._dtypes = self.changed_dtypes()
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def changed(self) -> list[str]:
        """The stored names of the tensors that differ from the base's."""
        return [name for name in self.specs if self._changes_of(name) or self._replacement(name)]

    def changed_dtypes(self) -> dict[str, str]:
        """Return the dtype in which every changed parameter is given, by its name in the stock class."""
        return {self._places[name].parameter: self.specs[name].dtype for name in self.changed}

    @property
    def fingerprint(self) -> str:
        """A hash by which checkpoints are told apart."""
        return hashlib.sha256(f"{self._base.fingerprint}\n{self.adapter.fingerprint}".encode()).hexdigest()

    def sample(self) -> str:
        """Return a hash of headers and of a few bytes of every tensor, as the files hold them now."""
        return hashlib.sha256(f"{self._base.sample()}\n{self.adapter.fingerprint}".encode()).hexdigest()

    def location(self, name: str) -> str:
        """Return the paths of the files that hold a tensor and what is added to it, for messages."""
        added = f" + {self.adapter.file.path}" if self._changes_of(name) or self._replacement(name) else ""
        return f"{self._base.location(name)}{added}"

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor as blocks of its first dimension; see :class:`~upcycle.checkpoints.tensor_store.TensorStore`."""
        import torch

        dtype = getattr(torch, self.specs[name].dtype)
        first = part[0] if part else 0
        for block in self._before(name, most_bytes, part, multiple):
            rows = self._added(self._places[name], block, first) if self._changes_of(name) else block
            yield rows.to(dtype)
            first += len(block) if block.ndim else 0

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor."""
        import torch

        blocks = list(self.chunks(name, 1 << 26))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def adapted(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a parameter of the stock class, given the base's: for models that transformers has loaded.

        It is rounded as the stored tensor is, and then has the dtype of ``weight``.
        """
        import torch

        stored = self._replaced.get(parameter)
        if parameter not in self._dtypes:
            return weight
        made = self.adapter.file.read(stored) if stored else weight
        if parameter in self._changes:
            made = self._added(StockPlace(parameter), made, 0)
        return made.to(getattr(torch, self._dtypes[parameter])).to(weight.dtype)

    def _replacement(self, name: str) -> str | None:
        place = self._places.get(name)
        return self._replaced.get(place.parameter) if place else None

    def _before(
        self, name: str, most_bytes: int, part: tuple[int, int] | None, multiple: int
    ) -> Iterator[torch.Tensor]:
        """Yield blocks of what products are added to: the base's tensor, or what replaces it, in which experts may be fused."""
        stored = self._replacement(name)
        if stored is None:
            return self._base.chunks(name, most_bytes, part, multiple)
        place, shape = self._places[name], self.specs[name].shape
        if place.expert is None:
            return self.adapter.file.chunks(stored, most_bytes, part, multiple)
        spec = self.adapter.file.specs[stored]
        (expert,) = self.adapter.file.chunks(stored, spec.nbytes, (place.expert, 1))
        rows = expert[0, place.first : place.first + shape[0]]
        return (
            rows[at : at + count] for at, count in row_blocks(TensorSpec(shape, spec.dtype), most_bytes, part, multiple)
        )

    def _changes_of(self, name: str) -> list[LowRankChange]:
        place = self._places.get(name)
        if place is None:
            return []
        found = self._changes.get(place.parameter, ())
        return [change for change in found if _overlap(change, place, self.specs[name].shape)]

    def _added(self, place: StockPlace, block: torch.Tensor, first: int) -> torch.Tensor:
        """Return rows of the tensor at a place, from ``first`` on, with everything added to them, fp64."""
        made = block.double()
        if block.ndim == 3:
            for number in range(len(block)):
                self._add_rows(place.parameter, first + number, made[number], 0)
        else:
            self._add_rows(place.parameter, place.expert, made, place.first + first)
        return made

    def _add_rows(self, parameter: str, expert: int | None, rows: torch.Tensor, first: int) -> None:
        """Add all changes of a parameter to rows of its matrix, or of an expert's, in place."""
        import torch

        columns = rows.shape[1]
        step = max(1, GRID_BYTES // (8 * columns))
        for change in self._changes[parameter]:
            if change.place.expert is not None and change.place.expert != expert:
                continue
            left, right = self._factors(change, expert)
            begin, end = change.place.first, change.place.first + len(left)
            for start in range(begin, end, step):
                stop = min(start + step, end)
                low, high = max(start, first), min(stop, first + len(rows))
                if low < high:
                    product = left[start - begin : stop - begin] @ right
                    rows[low - first : high - first] += change.scale * product[low - start : high - start]
            if change.pair.magnitude:
                lengths = self.adapter.file.read(change.pair.magnitude).double().flatten()[first : first + len(rows)]
                rows *= (lengths / torch.linalg.vector_norm(rows, dim=1))[:, None]

    def _factors(self, change: LowRankChange, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices whose product, rows by columns of the parameter's matrix, is added; fp64.

        PEFT stores those of all experts as A ``[E r, in]``, expert by expert, and B ``[out, r E]``, in which the experts' columns
        alternate.
        """
        pair = change.pair
        if pair.path + str(pair.depth) not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            halves = (self.adapter.file.read(name).double() for name in (pair.a, pair.b))
            self._kept[pair.path + str(pair.depth)] = next(halves), next(halves)
        a, b = self._kept[pair.path + str(pair.depth)]
        if change.experts:
            assert expert is not None
            a = a.view(change.experts, change.rank, -1)[expert]
            b = b.view(len(b), change.rank, change.experts)[:, :, expert]
        return (a.T, b.T) if change.transposed else (b, a)


def _overlap(change: LowRankChange, place: StockPlace, shape: tuple[int, ...]) -> bool:
    """Return whether a change reaches rows of a stored tensor."""
    if change.place.expert is None or place.expert is None:
        return True
    if change.place.expert != place.expert:
        return False
    return change.place.first < place.first + shape[0] and place.first < change.place.first + change.rows
