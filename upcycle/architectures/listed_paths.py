"""Module paths of models whose FFNs are in no one list of layers: in an encoder and a decoder, in two towers, in stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

from upcycle.architectures.module_paths import ModulePaths


@dataclass(frozen=True)
class LayerPlace:
    """Says where layers are, below the base model, and which of their modules are the FFN.

    Attributes:
        layer: the path of a layer; in a description with ``{}`` for its number.
        first: the module whose place experts take, below the layer.
        ends: the module whose output is the FFN's, where that is another one.
    """

    layer: str
    first: str
    ends: str | None = None


@dataclass(frozen=True)
class ListedPaths(ModulePaths):
    """Numbers all layers through, in the order of ``places``. Only :meth:`found_in` a model is known how many there are.

    Args:
        places: patterns of layers, and in what :meth:`found_in` returns, the layers, below the whole model.
        known: whether ``places`` are layers.
    """

    body: str = ""
    places: tuple[LayerPlace, ...] = ()
    known: bool = False

    def found_in(self, model: Any) -> ListedPaths:
        """Return the paths of a model, with its FFNs or with experts in their place."""
        base = model.base_model
        prefix = f"{model.base_model_prefix}." if base is not model else ""
        found: dict[str, LayerPlace] = {}
        for place in self.places:
            for path in numbered(base, place.layer):
                if submodule(base, f"{path}.{place.first}") is not None:
                    found.setdefault(path, replace(place, layer=f"{prefix}{path}"))
        places = tuple(found.values())
        blocks = tuple(dict.fromkeys(place.first for place in places))
        return replace(self, body=prefix[:-1], blocks=blocks, places=places, known=True)

    def layer(self, index: int) -> str:
        """Return the path of one layer."""
        return self.places[index].layer

    def block_of(self, index: int, which: int = 0) -> str:
        """Return the path of the module whose place experts take."""
        return f"{self.layer(index)}.{self.places[index].first}"

    def first_in(self, index: int) -> str:
        """See :class:`~upcycle.architectures.module_paths.ModulePaths`."""
        return self.places[index].first

    def ends_in(self, index: int) -> str | None:
        """See :class:`~upcycle.architectures.module_paths.ModulePaths`."""
        return self.places[index].ends

    def layer_of(self, name: str) -> int | None:
        """Return the index of the layer that a tensor or module belongs to; None outside the layers."""
        head = name
        while head:
            head = head.rpartition(".")[0]
            if head in self._numbers:
                return self._numbers[head]
        return None

    def has(self, name: str) -> bool:
        """Return True: nothing of such a model is another part."""
        return True

    def layers_in(self, model: Any) -> Any:
        """Return the layers, in their order."""
        return [model.get_submodule(place.layer) for place in self.places]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {place.layer: index for index, place in enumerate(self.places)} if self.known else {}


def numbered(base: Any, pattern: str) -> Iterator[str]:
    """Yield the paths of the modules that a pattern with ``{}`` for numbers names, from 0 up to the first that is missing."""
    head, braces, tail = pattern.partition("{}")
    if not braces:
        if submodule(base, pattern) is not None:
            yield pattern
        return
    for i in count():
        if submodule(base, f"{head}{i}") is None:
            return
        yield from numbered(base, f"{head}{i}{tail}")


def submodule(base: Any, path: str) -> Any | None:
    """Return a module below another one, or None."""
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None
