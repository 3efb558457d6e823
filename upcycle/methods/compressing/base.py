"""The protocol of methods that compress a Mixture-of-Experts: fewer experts, left out or merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from upcycle.architectures.expert_terms import SHARED_FFN, DenseCut, FfnPart, LayerCut, Term
from upcycle.architectures.stored_moe import MoeModel
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import UsageError
from upcycle.methods.base import PREFERRED_MULTIPLE
from upcycle.methods.growing.base import Described, Grown, Growth, Piece

if TYPE_CHECKING:
    import torch

    from upcycle.methods.compressing.observations import LayerObservations, Observations
    from upcycle.recipe.conversion_recipe import Recipe

Matrices = Callable[[int], dict[str, "torch.Tensor"]]
"""Returns the matrices of an expert of one layer: gate and up ``[F, d]``, down ``[d, F]``, fp32.

``SHARED_FFN`` stands for the shared ones."""

Cut = LayerCut | DenseCut


class CutSizes(NamedTuple):
    """The sizes of a MoE that a compression may change: routed experts, experts per token, neurons of an expert."""

    experts: int
    top_k: int
    width: int

    @classmethod
    def of(cls, model: MoeModel) -> CutSizes:
        """Return those of a model."""
        return cls(model.experts, model.top_k, model.expert_width)


@dataclass(frozen=True)
class LayerSource:
    """What a method may look at to cut one layer.

    Attributes:
        layer: its index.
        seen: what calibration text said of it.
        top_k: experts per token.
        normalized: whether the chosen experts' weights sum to 1.
        sigmoid: whether scores are sigmoids of the logits, and not their softmax.
        matrices: reads the matrices of an expert.
        seed: of random choices.
    """

    layer: int
    seen: LayerObservations
    top_k: int
    normalized: bool
    sigmoid: bool
    matrices: Matrices
    seed: int


class Compression(Growth):
    """Makes a smaller MoE of the same architecture: every layer has the same, smaller number of experts.

    It looks at :class:`~upcycle.methods.compressing.observations.Observations` alone, so that one pass over text serves every
    method and ratio.
    """

    kind = "compression"
    takes = "moe"
    calibrated = True
    keys = frozenset({"keep", "observations", "calibration", "refit", "reconstruction", "dtype"})
    next_step = "upcycle evaluate {out} --reference {source}"
    looks: ClassVar[bool] = True  # whether text decides
    observes: ClassVar[bool] = True  # whether it reads observations at all
    dense: ClassVar[bool] = False  # whether the result is a dense model
    ternary: ClassVar[bool] = False  # whether experts are rounded, and the refit is of what rounding leaves

    @abstractmethod
    def cut(self, source: LayerSource, keep: int) -> Cut:
        """Decide what the experts of a layer are made of.

        Args:
            source: the layer.
            keep: what :meth:`kept` returned: for most methods, the number of experts of the result.
        """

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

    def before(self, model: MoeModel, keep: int) -> Cut:
        """Return a cut of the shapes that the result will have, before anything is decided."""
        return LayerCut.keeping(range(keep))

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, for the promise, and what the result is, in a few words."""
        gone = f"{model.experts - keep} of {model.experts} experts are gone from every layer"
        return gone, f"{keep} experts from {model.experts}, top-{model.top_k}"

    def grow(self, source: Described, recipe: Recipe, choice: Any = None) -> Grown:
        """Describe the result; ``choice`` are the cuts by layer, None before they are decided."""
        model = MoeModel.read(source.raw, source.specs, source.where)
        keep = self.kept(model, recipe)
        sizes = self.sizes(model, keep)
        cuts = choice or dict.fromkeys(model.moe_layers, self.before(model, keep))
        exact = not self.changed(model, keep)
        gone, summary = self.said(model, keep)
        return Grown(
            config=model.config_with(*sizes),
            pieces=tuple(cut_pieces(model, cuts)),
            promise=("exact", "nothing is cut") if exact else ("approximate", gone),
            summary=summary,
            made={"experts": {str(layer): described_cut(cut) for layer, cut in cuts.items()}},
            context=model.context,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            tied=model.tied,
            idle=model.expert_elements
            // model.experts
            * sizes.width
            // model.expert_width
            * (sizes.experts - sizes.top_k),
            source_idle=model.expert_elements // model.experts * (model.experts - model.top_k),
            warnings=() if exact else (LOSS_WARNING,),
        )

    def cuts(
        self, model: MoeModel, seen: Observations, keep: int, matrices: Callable[[int], Matrices], seed: int
    ) -> dict[int, Cut]:
        """Decide every layer.

        Args:
            model: the source.
            seen: its observations.
            keep: what :meth:`kept` returned.
            matrices: returns what reads the matrices of a layer's experts.
            seed: of random choices.
        """
        found: dict[int, Cut] = {}
        for layer, observed in seen.layers.items():
            source = LayerSource(layer, observed, model.top_k, model.normalized, model.sigmoid, matrices(layer), seed)
            found[layer] = self.cut(source, keep)
        return found


LOSS_WARNING = (
    "cuts hurt text of other kinds than the calibration's, and what the model writes, more than the perplexity of the calibrated "
    "kind shows: measure both"
)


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
    if keep == model.experts and recipe.keep < 1:
        raise UsageError(
            f"keep {recipe.keep:g} of {model.experts} experts rounds to all of them, and nothing would be smaller",
            hint=f"--keep {(model.experts - 1) / model.experts:.4g} leaves one out; --keep 1 copies the model",
        )
    return keep


def cut_pieces(model: MoeModel, cuts: dict[int, LayerCut]) -> list[Piece]:
    """Return every tensor of the result, in the order in which they are written."""
    names = model.names
    outside = {name: Origin(name) for name in names[None]}
    first = {name: origin for name, origin in outside.items() if "embed" in name}
    pieces = [Piece("embeddings", None, first)]
    for layer in sorted(layer for layer in names if layer is not None):
        tensors = (
            dict(model.cut_origins(layer, cuts[layer]))
            if layer in cuts
            else {name: Origin(name) for name in names[layer]}
        )
        pieces.append(Piece(f"layer {layer}", layer, tensors))
    rest = {name: origin for name, origin in outside.items() if name not in first}
    return [*pieces, Piece("final norm", None, rest)]


def described_cut(cut: Cut) -> dict[str, Any]:
    """Return a cut as plain data."""
    if isinstance(cut, DenseCut):
        parts = [{"terms": _described(part.terms), "scale": part.scale, "rank": part.rank} for part in cut.parts]
        return {"width": cut.width, "parts": parts}
    return {"experts": [_described(terms) for terms in cut.experts], "rows": [*cut.rows]}


def _described(terms: Iterable[Term]) -> list[dict[str, Any]]:
    return [
        {
            "expert": "shared" if t.expert == SHARED_FFN else t.expert,
            "weight": t.weight,
            "order": None if t.order is None else [*t.order],
            **({"ternary": True} if t.ternary else {}),
        }
        for t in terms
    ]


def cut_of(content: dict[str, Any]) -> Cut:
    """Return the cut that :func:`described_cut` described."""
    if "parts" in content:
        parts = tuple(FfnPart(_terms(part["terms"]), part["scale"], part["rank"]) for part in content["parts"])
        return DenseCut(content["width"], parts)
    return LayerCut(tuple(_terms(terms) for terms in content["experts"]), tuple(content["rows"]))


def _terms(described: Iterable[dict[str, Any]]) -> tuple[Term, ...]:
    return tuple(
        Term(
            SHARED_FFN if t["expert"] == "shared" else t["expert"],
            t["weight"],
            None if t["order"] is None else tuple(t["order"]),
            t.get("ternary", False),
        )
        for t in described
    )


def stepped(width: int) -> int:
    """Return what a number of neurons is rounded to: what hardware has tiles of, where FFNs are wide."""
    return 64 if width >= 1024 else 32 if width >= 256 else PREFERRED_MULTIPLE


def best(scores: torch.Tensor | Iterable[float], keep: int) -> LayerCut:
    """Return the cut that keeps the experts of the largest scores; of equals the first."""
    import torch

    values = torch.as_tensor(list(scores) if not isinstance(scores, torch.Tensor) else scores, dtype=torch.float64)
    order = torch.sort(values, descending=True, stable=True).indices
    return LayerCut.keeping(order[:keep].tolist())
