"""Leaves out experts by a genetic search in every layer, and tries the best sets of neighbouring layers together (MoE-I2)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.dropping.naee import error_of
from upcycle.methods.compressing.layer_source import LayerSource, ModelSource
from upcycle.methods.compressing.set_search import best_sets, ranked_experts
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    pass


class MoeI2Parameters(PluginParameters):
    """Parameters of :class:`MoeI2`."""

    population: int = Field(
        32, ge=2, description="sets of experts that live on from generation to generation, per layer"
    )
    generations: int = Field(40, ge=0, description="generations of as many children each")
    candidates: int = Field(
        3, ge=1, le=8, description="the best sets of a layer that are tried together (the paper's K)"
    )
    reach: int = Field(
        3,
        ge=1,
        le=6,
        description="layers whose sets are tried together (the paper's T); 1 tries none, and needs no text",
    )


class MoeI2(Compression):
    """Implements the pruning of experts of MoE-I2 (Yang et al. 2024, arXiv 2411.01016, section 3.1, its KT reception field).

    In every layer a genetic search looks for the sets of experts whose absence changes the layer's output least (squared error): a
    child is drawn from the union of two parents' sets, and one of its experts may be exchanged. The best K sets of T neighbouring
    layers are then tried in all ``K^T`` combinations, and the one stays behind whose last layer the stream is closest to the uncut
    model's.

    Deviations: the paper lets layers keep different numbers of experts, by how much single experts matter in them; stock
    architectures have one number. Populations and generations, which it does not say (in what we could read), are ours, and where
    there are no more sets than a search would try, all are. Errors of single layers are those of sampled tokens, from observations, as
    ``naee`` has them; the layers of the T before are cut already when the next are tried. Its second stage, low rank inside
    experts, is a method of its own.
    """

    name = "moe_i2"
    title = "Genetic search over layers (MoE-I2)"
    paper = "https://arxiv.org/abs/2411.01016"
    Parameters = MoeI2Parameters
    parameters: MoeI2Parameters

    @property
    def tries(self) -> bool:
        """Whether sets of several layers are tried on text."""
        return self.parameters.reach > 1 and self.parameters.candidates > 1

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """Return the best set of a layer alone."""
        return self._sets(source, keep, 1)[0]

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """Decide every layer, T at a time; see the class."""
        trial, sources = source.trial, source.layers
        if trial is None:
            return super().cuts(source, keep)
        layers, found = list(sources), {}
        for first in range(0, len(layers), self.parameters.reach):
            group = layers[first : first + self.parameters.reach]
            found.update(
                trial.closest({layer: self._sets(sources[layer], keep, self.parameters.candidates) for layer in group})
            )
        return dict(found)

    def _sets(self, source: LayerSource, keep: int, wanted: int) -> list[LayerCut]:
        """Return the best sets of a layer, as cuts."""
        from upcycle.ffn.random_weights import stream

        order = ranked_experts(source, partial(error_of, source))

        def kept(gone: tuple[int, ...]) -> list[int]:
            return sorted(expert for rank, expert in enumerate(order) if rank not in gone)

        found = best_sets(
            count=len(order),
            size=len(order) - keep,
            error=lambda gone: error_of(source, kept(gone)),
            population=self.parameters.population,
            generations=self.parameters.generations,
            wanted=wanted,
            rng=stream(source.seed, f"layer {source.layer}", "sets"),
        )
        return [LayerCut.keeping(kept(gone)) for gone in found]
