"""Finds what each tensor of a LoRA folder changes: which rows of which parameter of the stock class, and in which stored tensors.

PEFT names modules as they are in memory, where experts are fused; folders of older versions name experts one by one. Files may
store experts either way, and under other names. Everything meets in the parameters of the stock class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from upcycle.adapters.folder import AdapterFolder, Pair
from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import build_config, empty_model
from upcycle.architectures.stock_classes import expert_leaves, rows_of_stock, stock_name_of
from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.folder_contents import shortened

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class StockPlace:
    """Where a tensor lies in a parameter of the stock class: whole, or one expert's rows from ``first`` on."""

    parameter: str
    expert: int | None = None
    first: int = 0


@dataclass(frozen=True)
class LowRankChange:
    """A low-rank product that is added to a parameter, or to an expert's rows of it.

    Attributes:
        pair: the matrices in the folder.
        place: what they are added to.
        scale: the product's factor.
        rank: rows of A that belong to one expert.
        experts: of all which A and B hold matrices; 0: of none, they are plain matrices.
        transposed: whether the parameter is ``[in, out]``, as in Conv1D, embeddings, and some classes' experts.
        rows: rows of the parameter's matrix that the product has.
    """

    pair: Pair
    place: StockPlace
    scale: float
    rank: int
    experts: int
    transposed: bool
    rows: int


class StockPlaces:
    """The parameters of a base's stock class, and where stored tensors lie in them.

    Args:
        raw: the base's ``config.json``.
        stored: names and shapes of its stored tensors.
        where: the base, for messages.
    """

    def __init__(self, raw: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]], where: str) -> None:
        self.where, self.raw = where, raw
        self.model = empty_model(build_config(raw, where), where)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        names = stock_name_of(self.model, stored, only_renamed=True)
        groups = rows_of_stock(self.model, stored) or {}
        self._renamed: dict[str, str] = {}
        self.places: dict[str, StockPlace] = {}
        for name, target in names.items():
            if self.shapes.get(target) == stored[name]:
                self.places[name] = StockPlace(target)
        for target, rows in groups.items():
            for expert, parts in enumerate(rows):
                first = 0
                for name in parts:
                    self.places[name] = StockPlace(target, expert, first)
                    first += stored[name][0]

    @property
    def tied(self) -> frozenset[str]:
        """The names of the embedding's and the head's weights where they are one."""
        paths = module_paths_of(self.model.config)
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        return frozenset((paths.embedding_weight, f"{paths.head}.weight")) if tied else frozenset()

    @cached_property
    def modules(self) -> dict[str, Any]:
        """The modules of the stock class, by their paths."""
        return dict(self.model.named_modules())

    @cached_property
    def leaves(self) -> tuple[str, str, str] | None:
        """The names of an expert's gate, up and down where files hold experts one by one; None: they hold them together."""
        return expert_leaves(self.raw)

    def learn(self, names: Iterable[str]) -> None:
        """Look up many names at once, for :meth:`stock_name`: that of one takes as long."""
        self._renamed |= stock_name_of(self.model, [name for name in names if name not in self.shapes])

    def stock_name(self, name: str) -> str:
        """Return the stock class's name of a parameter that a folder may call as older versions of transformers did."""
        if name not in self.shapes and name not in self._renamed:
            self.learn([name])
        return self._renamed.get(name, name)


def changes(adapter: AdapterFolder, stock: StockPlaces) -> list[LowRankChange]:
    """Return what the pairs of a folder are added to.

    Raises:
        CheckpointError: the base has no such module, or a matrix is of another shape or rank; the message names both.
        RefusalError: the change cannot be a change of weights alone.
    """
    stock.learn(f"{pair.path}.weight" for pair in adapter.pairs)
    return [_change(adapter, stock, pair) for pair in adapter.pairs]


def replaced(adapter: AdapterFolder, stock: StockPlaces) -> dict[str, str]:
    """Return the folder's tensors that replace whole parameters, by the names of these.

    Raises:
        CheckpointError: the base has no such parameter, or one of another shape.
        RefusalError: it is tied to another.
    """
    found = {}
    for name, stored in adapter.whole.items():
        parameter = stock.stock_name(name)
        if parameter not in stock.shapes:
            raise _absent(adapter, stock, name)
        if adapter.file.specs[stored].shape != stock.shapes[parameter]:
            raise CheckpointError(
                f"{adapter.file.path}: '{shortened(name)}' is {list(adapter.file.specs[stored].shape)}, and {stock.where} has "
                f"{list(stock.shapes[parameter])}",
                hint="name the model that the adapter was trained on: --base MODEL (one with added tokens has other embeddings)",
            )
        _refuse_tied(adapter, stock, parameter)
        found[parameter] = stored
    return found


def _change(adapter: AdapterFolder, stock: StockPlaces, pair: Pair) -> LowRankChange:
    settings = adapter.settings
    place, key, transposed = _target(adapter, stock, pair)
    _refuse_tied(adapter, stock, place.parameter)
    shape = stock.shapes[place.parameter]
    matrix = shape[-2:]
    experts = shape[0] if len(shape) == 3 and place.expert is None else 0
    rank, count = settings.rank_of(key), max(1, experts)
    inputs, outputs = (matrix[0], matrix[1]) if transposed else (matrix[1], matrix[0])
    if place.expert is not None:
        outputs = _own_rows(place, outputs)
    wanted = (rank * count, inputs), (outputs, rank * count)
    found = tuple(adapter.file.specs[name].shape for name in (pair.a, pair.b))
    if found != wanted:
        raise CheckpointError(
            f"{adapter.file.path}: '{shortened(pair.path)}' has matrices {list(found[0])} and {list(found[1])}; rank {rank} on "
            f"{list(shape)} of {stock.where} asks for {list(wanted[0])} and {list(wanted[1])}",
            hint="name the model that the adapter was trained on: --base MODEL; or copy the adapter's folder again",
        )
    if pair.magnitude:
        lengths = adapter.file.specs[pair.magnitude].shape
        if transposed or experts or place.expert is not None:
            raise RefusalError(
                f"{adapter.file.path}: '{shortened(pair.path)}' has DoRA's lengths, which are read for linear layers alone",
                hint="merge it with peft, and name the result",
            )
        if math.prod(lengths) != outputs:
            raise CheckpointError(f"{adapter.file.path}: tensor '{pair.magnitude}' is {list(lengths)}, not [{outputs}]")
    return LowRankChange(
        pair,
        place,
        settings.scale_of(key),
        rank,
        experts,
        transposed,
        outputs if place.expert is not None else matrix[0],
    )


def _target(adapter: AdapterFolder, stock: StockPlaces, pair: Pair) -> tuple[StockPlace, str, bool]:
    """Return what a pair is added to, the path by which PEFT looks up its rank, and whether that is stored ``[in, out]``."""
    path = pair.path
    if path not in stock.modules:
        path = stock.stock_name(f"{path}.weight").removesuffix(".weight")
    if path in stock.modules:
        module = stock.modules[path]
        # PEFT wraps a module's parameters in their order, each wrapper around the one before.
        names = [
            name
            for name, _ in module.named_parameters(recurse=False)
            if adapter.settings.targets_parameter(f"{path}.{name}")
        ]
        if pair.depth < len(names):
            name = names[len(names) - 1 - pair.depth]
            turned = module.get_parameter(name).ndim == 3 and bool(getattr(module, "is_transposed", False))
            return StockPlace(f"{path}.{name}"), f"{path}.{name}", turned
        if not pair.depth and f"{path}.weight" in stock.shapes and len(stock.shapes[f"{path}.weight"]) == 2:
            turned = pair.embedding or type(module).__name__ == "Conv1D"
            return StockPlace(f"{path}.weight"), path, turned
        raise _absent(adapter, stock, pair.path)
    if found := _single_expert(stock, pair):
        return found, pair.path, False
    raise _absent(adapter, stock, pair.path)


def _single_expert(stock: StockPlaces, pair: Pair) -> StockPlace | None:
    """Return where one expert's matrix lies that a folder names as files do: ``experts.3.w1``."""
    match, leaves = _EXPERT.fullmatch(pair.path), stock.leaves
    if not match or not leaves or pair.depth or match[3] not in leaves:
        return None
    part = leaves.index(match[3])
    fused = stock.stock_name(f"{pair.path}.weight")
    if fused not in stock.shapes:
        fused = next((name for name in stock.shapes if name.endswith(_tail(match[1], part))), "")
    shape = stock.shapes.get(fused, ())
    if (
        len(shape) != 3
        or int(match[2]) >= shape[0]
        or getattr(stock.modules[fused.rpartition(".")[0]], "is_transposed", False)
    ):
        return None
    return StockPlace(fused, int(match[2]), shape[1] // 2 if part == 1 else 0)


def _tail(prefix: str, part: int) -> str:
    return f"{prefix}.{'down_proj' if part == 2 else 'gate_up_proj'}"


def _own_rows(place: StockPlace, rows: int) -> int:
    return rows // 2 if place.parameter.endswith("gate_up_proj") else rows


def _refuse_tied(adapter: AdapterFolder, stock: StockPlaces, parameter: str) -> None:
    if parameter in stock.tied:
        raise RefusalError(
            f"{adapter.folder} changes '{parameter}', and in {stock.where} embedding and head are one matrix: which of both it means "
            "is not stored",
            hint="leave embeddings and head out of the adapter, or merge it with peft and name the result",
        )


def _absent(adapter: AdapterFolder, stock: StockPlaces, name: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.file.path}: it changes '{shortened(name)}', which {stock.where} ({stock.model.config.model_type}) does not have",
        hint="name the model that the adapter was trained on: --base MODEL",
    )


def unplaced(parameters: Iterable[str], stock: StockPlaces) -> list[str]:
    """Return those parameters that no stored tensor holds, or that transformers makes of stored ones by more than stacking."""
    held = {place.parameter for place in stock.places.values()}
    return sorted(set(parameters) - held)
