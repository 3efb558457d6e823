"""Leaves out experts, and then mixes the others into those that stay, by evolution (EEP)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut, Term
from upcycle.ffn.random_weights import stream
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.dropping.naee import error_of, kept_weights
from upcycle.methods.compressing.layer_source import LayerSource, Matrices, ModelSource
from upcycle.methods.compressing.set_search import best_sets, evolved, ranked_experts
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    pass

Row = tuple[
    tuple[int, float], ...
]  # what an expert of the result is the sum of: ranks of experts, ascending, and coefficients
Mixed = tuple[Row, ...]
_KEPT_BYTES = 256 << 20  # of experts' matrices in memory
_CHANGED = 0.5  # of a child's rows


class EepParameters(PluginParameters):
    """Parameters of :class:`Eep`."""

    fitness: Literal["output", "loss"] = Field(
        "output",
        description="what evolution lessens: the error of a layer's output on sampled tokens, or the loss of the whole model on the "
        "calibration text",
    )
    population: int = Field(16, ge=2, description="individuals that may be parents")
    generations: int = Field(
        20, ge=0, description="of fitness=output: in either phase, a population's children so many times"
    )
    trials: int = Field(
        64, ge=1, description="of fitness=loss: in either phase, how often the whole model runs on text"
    )
    spread: float = Field(0.1, gt=0, description="the standard deviation of what a mutation adds to a coefficient")


class Eep(Compression):
    """Implements efficient expert pruning (Liu et al. 2024, arXiv 2407.00945): two matrices that evolve, without gradients.

    With E experts, ``W_RM`` ``[E', E]`` says which router rows are left, and ``W_EM`` ``[E', E]`` which sums of experts. In the
    pruning phase both are one and the same choice of experts. The merging phase begins with the best one found, and ``W_EM``
    becomes continuous: a child takes every row from either parent, and half of its rows then get a normal number added to one
    coefficient. The best so far is never lost, so that merging does not do worse than pruning on what is measured.

    Fitness is the squared error of a layer's output on sampled tokens by default (``output``): observations are enough, every layer
    is searched alone, and thousands of individuals cost little. ``loss`` is the paper's way, a measure of the whole model, here the
    loss on the calibration text: every individual is a run of the model, so that few are tried, and they fit that text.

    Deviations: ``W_RM`` acts behind the softmax in the paper, and becomes continuous, too; a stock router has one row per expert,
    and its mapping stays a choice. A row of ``W_EM`` changes one coefficient at a time, so that an expert is the sum of few. Sizes
    of populations, numbers of generations and the spread are not said (in what we could read), and are ours.
    """

    name = "eep"
    title = "Evolution of pruning and merging (EEP)"
    paper = "https://arxiv.org/abs/2407.00945"
    Parameters = EepParameters
    parameters: EepParameters

    @property
    def tries(self) -> bool:
        """Whether fitness is measured on text."""
        return self.parameters.fitness == "loss"

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """Return the best of both phases for a layer alone."""
        given, rng = self.parameters, stream(source.seed, f"layer {source.layer}", "evolution")
        layer = self._pruned(source, keep, rng)
        trials = given.population * given.generations
        child = partial(self._child, len(layer.order), rng)
        return layer.cut(evolved([layer.alone], child, layer.error, given.population, trials, rng))

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """Decide all layers together, by the loss on text; see the class."""
        trial = source.trial
        if trial is None:
            return super().cuts(source, keep)
        given, rng = self.parameters, stream(source.seed, "all layers", "evolution")
        sources, experts = source.layers, source.model.experts
        order = {layer: ranked_experts(own, partial(error_of, own)) for layer, own in sources.items()}
        begin = {layer: self._pruned(own, keep, rng).kept for layer, own in sources.items()}

        def pruned(kept: dict[int, tuple[int, ...]]) -> float:
            return trial.loss({layer: LayerCut.keeping([order[layer][r] for r in own]) for layer, own in kept.items()})

        def exchanged(one: dict[int, tuple[int, ...]], other: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
            found = {}
            for layer in one:
                own = list((one, other)[_coin(rng)][layer])
                outside = [rank for rank in range(experts) if rank not in own]
                if outside and _coin(rng):
                    own[_drawn(len(own), rng)] = outside[_drawn(len(outside), rng)]
                found[layer] = tuple(sorted(own))
            return found

        best = evolved([begin], exchanged, pruned, given.population, given.trials, rng)
        layers = {layer: Layer(own, order[layer], best[layer]) for layer, own in sources.items()}

        def mixed(one: dict[int, Mixed], other: dict[int, Mixed]) -> dict[int, Mixed]:
            return {layer: self._child(experts, rng, one[layer], other[layer]) for layer in one}

        def loss(one: dict[int, Mixed]) -> float:
            return trial.loss({layer: layers[layer].cut(rows) for layer, rows in one.items()})

        alone = {layer: own.alone for layer, own in layers.items()}
        found = evolved([alone], mixed, loss, given.population, given.trials, rng)
        return {layer: layers[layer].cut(rows) for layer, rows in found.items()}

    def _pruned(self, source: LayerSource, keep: int, rng: torch.Generator) -> Layer:
        """Return a layer with the experts that the pruning phase keeps, by its own output alone."""
        order = ranked_experts(source, partial(error_of, source))
        everyone = range(len(order))

        def error(gone: tuple[int, ...]) -> float:
            return error_of(source, sorted(order[rank] for rank in everyone if rank not in gone))

        given = self.parameters
        (gone,) = best_sets(len(order), len(order) - keep, error, given.population, given.generations, 1, rng)
        return Layer(source, order, tuple(rank for rank in everyone if rank not in gone))

    def _child(self, experts: int, rng: torch.Generator, one: Mixed, other: Mixed) -> Mixed:
        """Return a child of two parents: rows of either, of some of which one coefficient is changed."""
        rows = []
        for mine, theirs in zip(one, other, strict=True):
            row = dict((mine, theirs)[_coin(rng)])
            if float(torch.rand((), generator=rng)) < _CHANGED:
                rank = _drawn(experts, rng)
                row[rank] = row.get(rank, 0.0) + self.parameters.spread * float(torch.randn((), generator=rng))
            rows.append(tuple(sorted(row.items())))
        return tuple(rows)


@dataclass(frozen=True)
class Layer:
    """Measures sums of a layer's experts on the sampled tokens.

    Attributes:
        source: the layer.
        order: its experts by rank.
        kept: the ranks of those that stay, ascending.
    """

    source: LayerSource
    order: list[int]
    kept: tuple[int, ...]

    @property
    def alone(self) -> Mixed:
        """The experts that stay, each by itself."""
        return tuple(((rank, 1.0),) for rank in self.kept)

    def cut(self, rows: Mixed) -> LayerCut:
        """Return what the layer's experts are made of, in the order of those that stay."""
        made = []
        for rank, row in zip(self.kept, rows, strict=True):
            terms = tuple(sorted((Term(self.order[r], weight) for r, weight in row), key=lambda term: term.expert))
            made.append((self.order[rank], terms))
        made.sort(key=lambda one: one[0])
        return LayerCut(tuple(terms for _, terms in made), tuple(first for first, _ in made))

    def error(self, rows: Mixed) -> float:
        """Return the squared error of the layer's output, over that of one without any experts."""
        left, whole = self._target.clone(), float(self._target.square().sum())
        for place, row in enumerate(rows):
            tokens, _ = self._used[place]
            left[tokens] -= self._part(place, row)
        return float(left.square().sum()) / whole if whole else 0.0

    def _part(self, place: int, row: Row) -> torch.Tensor:
        """Return what an expert of the result adds to the tokens that choose it, fp64 ``[t, d]``."""
        if (place, row) not in self._known:
            tokens, weights = self._used[place]
            matrices: dict[str, torch.Tensor] = {}
            for rank, weight in row:
                for name, matrix in self._matrices(self.order[rank]).items():
                    matrices[name] = weight * matrix + matrices[name] if name in matrices else weight * matrix
            self._known[place, row] = weights[:, None] * self._output(matrices, tokens)
        return self._known[place, row]

    def _output(self, matrices: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return self.source.output(matrices, self.source.seen.sample_inputs[tokens]).double()

    @cached_property
    def _matrices(self) -> Matrices:
        """What reads an expert's matrices, and keeps some in memory."""
        size = sum(matrix.nbytes for matrix in self.source.matrices(self.order[0]).values())
        return lru_cache(max(2, _KEPT_BYTES // size))(self.source.matrices)

    @cached_property
    def _known(self) -> dict[tuple[int, Row], torch.Tensor]:
        return {}

    @cached_property
    def _used(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For every expert of the result, the sampled tokens that choose it, and its weights on them."""
        weights = kept_weights(self.source, sorted(self.order[rank] for rank in self.kept))
        found = []
        for rank in self.kept:
            own = weights[:, self.order[rank]]
            tokens = own.nonzero().flatten()
            found.append((tokens, own[tokens]))
        return found

    @cached_property
    def _target(self) -> torch.Tensor:
        """The output of the uncut layer's routed experts, fp64 ``[S, d]``."""
        seen = self.source.seen
        total = torch.zeros(seen.sample_inputs.shape, dtype=torch.float64)
        for expert in self.order:
            own = seen.sample_weights[:, expert].double()
            tokens = own.nonzero().flatten()
            total[tokens] += own[tokens, None] * self._output(self._matrices(expert), tokens)
        return total


def _coin(rng: torch.Generator) -> int:
    return int(torch.randint(2, (), generator=rng))


def _drawn(count: int, rng: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=rng))
