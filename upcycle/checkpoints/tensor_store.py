"""What gives a checkpoint its tensors, by their stored names or by others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from upcycle.files.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch


class TensorStore(Protocol):
    """What gives a checkpoint its tensors; shapes and dtypes are known without reading one."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of every tensor, by name."""

    @property
    def fingerprint(self) -> str:
        """A hash by which checkpoints are told apart."""

    def sample(self) -> str:
        """Return a hash of headers and of a few bytes of every tensor, as the files hold them now."""

    def location(self, name: str) -> str:
        """Return the path of the file that holds a tensor, for messages."""

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor as blocks of its first dimension.

        Args:
            name: the tensor.
            most_bytes: the largest block, unless ``multiple`` rows are larger.
            part: first row and number of rows to read; default: all rows.
            multiple: all blocks but the last have a multiple of this many rows.
        """

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor."""


class RenamedStore:
    """Gives the tensors of another store by other names; those that have none here are left out.

    Args:
        store: the other store.
        names: its names, by those that are used here.
    """

    def __init__(self, store: TensorStore, names: Mapping[str, str]) -> None:
        self._store, self._names = store, names
        self.specs: Mapping[str, TensorSpec] = {name: store.specs[stored] for name, stored in names.items()}
        self.left_out = sorted(set(store.specs) - set(names.values()))

    @property
    def note(self) -> str | None:
        """A note for the user about tensors that are left out, or None."""
        if not self.left_out:
            return None
        first, more = self.left_out[0], len(self.left_out) - 1
        return f"tensors that stock transformers does not load are left out: '{first}'" + (
            f" and {more} more" if more else ""
        )

    @property
    def fingerprint(self) -> str:
        """A hash by which checkpoints are told apart."""
        return self._store.fingerprint

    def sample(self) -> str:
        """Return a hash of headers and of a few bytes of every tensor, as the files hold them now."""
        return self._store.sample()

    def location(self, name: str) -> str:
        """Return the path of the file that holds a tensor, for messages."""
        return self._store.location(self._names[name])

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor as blocks of its first dimension; see :meth:`TensorStore.chunks`."""
        return self._store.chunks(self._names[name], most_bytes, part, multiple)

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor."""
        return self._store.read(self._names[name])


def whole_store(store: TensorStore) -> TensorStore:
    """Return the store behind one that leaves tensors out, or gives them other names."""
    return store._store if isinstance(store, RenamedStore) else store
