"""The protocol of methods that compress a Mixture-of-Experts: fewer experts, left out or merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from upcycle.architectures.expert_terms import BlockCut, LayerCut, Term
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.base import PREFERRED_MULTIPLE
from upcycle.methods.compressing.described_cuts import Cut, described_cut
from upcycle.methods.compressing.layer_source import ExpertTokens, LayerSource, Matrices, ModelSource
from upcycle.methods.growing.base import Described, Grown, Growth, Piece, moe_pieces, refuse_groups

if TYPE_CHECKING:
    import torch

    from upcycle.models.own.routing.base import RouterRule
    from upcycle.models.own.routing.top_k import TopKRule
    from upcycle.recipe.conversion_recipe import Recipe

WRAPPED = "upcycle_moe"  # the target


class CutSizes(NamedTuple):
    """The sizes of a MoE that a compression may change: routed experts, experts per token, neurons of an expert, decoder layers.

    ``layers`` is 0 where as many are left as there were; ``dense`` of them lost their experts.
    """

    experts: int
    top_k: int
    width: int
    layers: int = 0
    dense: int = 0

    @classmethod
    def of(cls, model: MoeModel) -> CutSizes:
        """Return those of a model."""
        return cls(model.experts, model.top_k, model.expert_width)


class Compression(Growth):
    """Makes a smaller MoE of the same architecture: every layer has the same, smaller number of experts.

    It looks at :class:`~upcycle.methods.compressing.observations.Observations` alone, so that one pass over text serves every
    method and ratio.
    """

    kind = "compression"
    takes = "moe"
    calibrated = True
    keys = frozenset({"keep", "observations", "precision", "calibration", "refit", "reconstruction", "dtype", "target"})
    next_step = "upcycle evaluate {out} --reference {source}"
    looks: ClassVar[bool] = True  # whether text decides
    observes: ClassVar[bool] = True  # whether it reads observations at all
    dense: ClassVar[bool] = False  # whether the result is a dense model
    depth: ClassVar[bool] = False  # whether whole layers are left out
    mixes: ClassVar[bool] = False  # whether some layers get an FFN in the place of their experts
    wrapped: ClassVar[bool] = False  # whether only upcycle_moe holds the result
    factored: ClassVar[bool] = False  # whether the result has tensors that no stored one is, found on text
    refits: ClassVar[bool] = True  # whether down projections may be refitted
    makes: ClassVar[frozenset[str]] = frozenset()  # of router, gate, up and down, those that :meth:`made` makes anew
    removes: ClassVar[bool] = True  # whether anything is left out or merged; else only the precision changes
    grouped: ClassVar[bool] = False  # whether experts can be cut group by group, where routers choose groups first
    ternary: ClassVar[bool] = False  # whether experts are rounded, and the refit is of what rounding leaves

    @property
    def tries(self) -> bool:
        """Whether it runs cuts of several layers on text before it decides: observations are not enough then."""
        return False

    @abstractmethod
    def cut(self, source: LayerSource, keep: int) -> Cut:
        """Decide what the experts of a layer are made of.

        Args:
            source: the layer.
            keep: what :meth:`kept` returned: for most methods, the number of experts of the result.
        """

    def made(
        self, cut: LayerCut, keep: int, rows: torch.Tensor, tokens: Callable[[int], ExpertTokens], matrices: Matrices
    ) -> dict[str, torch.Tensor]:
        """Make tensors of a layer from its inputs, in a second pass over the text; only of methods that say what they make.

        Args:
            cut: what the experts are made of.
            keep: what :meth:`kept` returned.
            rows: the router's rows before the cut, fp32 ``[E, d]``.
            tokens: returns what an expert of the source did.
            matrices: reads the matrices of an expert of the source.

        Returns:
            ``router`` ``[E', d]``, or ``gate_up`` ``[E', 2 F', d]`` and ``down`` ``[E', d, F']``.
        """
        return {}

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return how much is kept of what the method cuts: experts.

        Raises:
            UsageError: the recipe does not say, or it cannot be.
        """
        return kept_experts(model, recipe)

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result."""
        return CutSizes(keep, model.top_k, model.expert_width)

    def changed(self, model: MoeModel, keep: int) -> bool:
        """Return whether anything is cut."""
        return self.sizes(model, keep) != CutSizes.of(model)

    def like(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of a model of the stock class that computes about as much as the result as ``upcycle_moe``."""
        return self.sizes(model, keep)

    def active(self, model: MoeModel, keep: int) -> float:
        """Return how many experts run for a token, in the mean."""
        return self.sizes(model, keep).top_k

    def before(self, model: MoeModel, keep: int) -> Cut:
        """Return a cut of the shapes that the result will have, before anything is decided."""
        return LayerCut.keeping(range(keep))

    def undecided(self, model: MoeModel, keep: int) -> dict[int, Cut]:
        """Return the cuts of all layers that are cut, before anything is decided."""
        return dict.fromkeys(model.moe_layers, self.before(model, keep))

    def config(self, model: MoeModel, sizes: CutSizes, cuts: Mapping[int, Cut]) -> dict[str, Any]:
        """Return the ``config.json`` of the result."""
        return model.config_with(sizes.experts, sizes.top_k, sizes.width)

    def pieces(self, model: MoeModel, cuts: Mapping[int, Cut]) -> list[Piece]:
        """Return every tensor of the result, in the order in which they are written."""
        experts = {layer: cut for layer, cut in cuts.items() if isinstance(cut, LayerCut)}
        return moe_pieces(model, {layer: dict(model.cut_origins(layer, cut)) for layer, cut in experts.items()})

    def remarks(self, model: MoeModel, recipe: Recipe, keep: int) -> tuple[str, ...]:
        """Return remarks for the plan."""
        return ()

    def unobserved(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """Decide every layer without observations, where the method reads none or nothing is cut; see :meth:`cuts`."""
        return self.undecided(source.model, keep)

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, for the promise, and what the result is, in a few words."""
        gone = f"{model.experts - keep} of {model.experts} experts are gone from every layer"
        return gone, f"{keep} experts from {model.experts}, top-{model.top_k}"

    def grow(self, source: Described, recipe: Recipe, choice: Any = None) -> Grown:
        """Describe the result; ``choice`` are the cuts by layer, None before they are decided."""
        model = MoeModel.read(source.raw, source.specs, source.where)
        keep = self.kept(model, recipe)
        sizes = self.sizes(model, keep)
        if (sizes.experts != model.experts and not self.grouped) or wraps(model, recipe):
            refuse_groups(model, self.name)
        cuts = choice or self.undecided(model, keep)
        exact = not self.changed(model, keep)
        gone, summary = self.said(model, keep)
        wrapped = wraps(model, recipe)
        if wrapped and (self.depth or self.mixes or self.makes):
            raise UsageError(
                f"target: {self.name} makes models of the MoE's own architecture, and none of {WRAPPED}",
                hint="leave --target out",
            )
        if wrapped:
            config, pieces = self._wrapped(model, source, cuts, keep)
        else:
            config, pieces = self.config(model, sizes, cuts), self.pieces(model, cuts)
        return Grown(
            config=config,
            pieces=tuple(pieces),
            promise=("exact", "nothing is cut") if exact else ("approximate", gone),
            summary=f"{recipe.target}, {summary}" if wrapped else summary,
            made={"experts": {str(layer): described_cut(cut) for layer, cut in cuts.items()}},
            context=model.context,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            tied=model.tied,
            idle=round(
                model.expert_elements
                // model.experts
                * (self.like(model, keep) if wrapped else sizes).width
                // model.expert_width
                * (sizes.experts - self.active(model, keep))
                * sum(layer in model.moe_layers and _has_experts(cut) for layer, cut in cuts.items())
                / len(model.moe_layers)
            ),
            source_idle=model.expert_elements // model.experts * (model.experts - model.top_k),
            warnings=(() if exact else (LOSS_WARNING, *_of_parts(model))) + self.remarks(model, recipe, keep),
        )

    def _wrapped(
        self, model: MoeModel, source: Described, cuts: dict[int, Any], keep: int
    ) -> tuple[dict[str, Any], list[Piece]]:
        """Return ``config.json`` and tensors of the result as ``upcycle_moe``."""
        from upcycle.architectures.moe.wrapped_moe import wrapped_moe

        made = wrapped_moe(
            model, cuts, lambda layer: self.rule(model, layer, cuts[layer], keep), source.made_of, source.where
        )
        outside = made.tensors[None]
        pieces = [Piece("embeddings", None, {name: origin for name, origin in outside.items() if name in made.first})]
        pieces += [Piece(f"layer {layer}", layer, own) for layer, own in made.tensors.items() if layer is not None]
        rest = {name: origin for name, origin in outside.items() if name not in made.first}
        return made.config, [*pieces, Piece("final norm", None, rest)]

    def rule(self, model: MoeModel, layer: int, cut: LayerCut, keep: int) -> RouterRule:
        """Return the routing rule of a layer of the result as ``upcycle_moe``: the stock class's."""
        return self.stock_rule(model, layer, self.sizes(model, keep).top_k)

    @staticmethod
    def stock_rule(model: MoeModel, layer: int, top_k: int) -> TopKRule:
        """Return the rule of a layer's router in the stock class, with ``top_k`` experts per token."""
        from upcycle.architectures.moe.wrapped_moe import has_bias, stock_rule

        return stock_rule(model, top_k, has_bias(model, layer))

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """Decide every layer.

        Args:
            source: the MoE.
            keep: what :meth:`kept` returned.
        """
        groups = source.model.groups if self.grouped and keep != source.model.experts else 1
        return {layer: self._of_groups(own, keep, groups) for layer, own in source.layers.items()}

    def _of_groups(self, source: LayerSource, keep: int, groups: int) -> Cut:
        """Decide a layer; where a router chooses groups first, each group by itself, as if there were no other experts."""
        if groups == 1:
            return self.cut(source, keep)
        size = source.seen.experts // groups
        rows: list[int] = []
        experts: list[tuple[Term, ...]] = []
        for first in range(0, source.seen.experts, size):
            own = self.cut(source.some(first, size), keep // groups)
            assert isinstance(own, LayerCut)
            rows += [first + row for row in own.rows]
            experts += [tuple(replace(term, expert=first + term.expert) for term in terms) for terms in own.experts]
        return LayerCut(tuple(experts), tuple(rows))


LOSS_WARNING = (
    "cuts hurt text of other kinds than the calibration's, and what the model writes, more than the perplexity of the calibrated "
    "kind shows: measure both"
)


def _of_parts(model: MoeModel) -> tuple[str, ...]:
    if not model.family.parts:
        return ()
    return (
        "calibration reads text alone: what experts do for images is not seen, so measure the result on images, too",
    )


def wraps(model: MoeModel, recipe: Recipe) -> bool:
    """Return whether the result is ``upcycle_moe``, and not of the architecture of the MoE.

    Raises:
        UsageError: the recipe names another target.
    """
    if recipe.target in ("auto", model.family.name):
        return False
    if recipe.target != WRAPPED:
        raise UsageError(
            f"target: {recipe.method} makes no '{recipe.target}' model of a '{model.family.name}' one",
            hint=f"leave --target out: the architecture stays; --target {WRAPPED} holds what no stock class can",
        )
    return True


def kept_experts(model: MoeModel, recipe: Recipe) -> int:
    """Return how many experts every layer keeps.

    Raises:
        UsageError: the recipe does not say, or fewer than a token chooses would be left.
    """
    if recipe.keep is None:
        raise UsageError(f"{recipe.method} needs to know how many experts are kept", hint="--keep 0.75")
    keep = round(recipe.keep * model.experts)
    if keep < model.top_k or keep < 1:
        least = -(-100 * model.top_k // model.experts) / 100
        raise UsageError(
            f"keep {recipe.keep:g} of {model.experts} experts leaves {keep}, and every token chooses {model.top_k}",
            hint=f"--keep {least:g} or more",
        )
    least = max(2, -(-model.top_k // (model.stock.topk_group or 1))) if model.groups > 1 else 1
    if keep < model.experts and model.groups > 1 and (keep % model.groups or keep // model.groups < least):
        size = model.experts // model.groups
        raise UsageError(
            f"keep {recipe.keep:g} of {model.experts} experts leaves {keep}, and each of {model.groups} groups ('n_group') must "
            f"have as many, and {least} at least",
            hint=f"--keep {', '.join(f'{kept / size:.4g}' for kept in range(size - 1, least - 1, -1)) or 1}",
        )
    if keep == model.experts and recipe.keep < 1:
        raise UsageError(
            f"keep {recipe.keep:g} of {model.experts} experts rounds to all of them, and nothing would be smaller",
            hint=f"--keep {(model.experts - 1) / model.experts:.4g} leaves one out; --keep 1 copies the model",
        )
    return keep


def _has_experts(cut: Cut) -> bool:
    return isinstance(cut, LayerCut) or cut == BlockCut(True)


def kept_of(cuts: Mapping[int, Cut]) -> list[int]:
    """Return the layers that stay, ascending."""
    return sorted(layer for layer, cut in cuts.items() if cut != BlockCut(False))


def stepped(width: int) -> int:
    """Return what a number of neurons is rounded to: what hardware has tiles of, where FFNs are wide."""
    return 64 if width >= 1024 else 32 if width >= 256 else PREFERRED_MULTIPLE


def best(scores: torch.Tensor | Iterable[float], keep: int) -> LayerCut:
    """Return the cut that keeps the experts of the largest scores; of equals the first."""
    import torch

    values = torch.as_tensor(list(scores) if not isinstance(scores, torch.Tensor) else scores, dtype=torch.float64)
    order = torch.sort(values, descending=True, stable=True).indices
    return LayerCut.keeping(order[:keep].tolist())
