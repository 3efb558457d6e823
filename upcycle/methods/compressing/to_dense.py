"""Makes a dense model of a Mixture-of-Experts: of every layer's experts one FFN, in the architecture that the MoE comes from."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from upcycle.architectures.expert_terms import SHARED_FFN, DenseCut, DenseMatrix, FfnPart, Term
from upcycle.architectures.moe.dense_twin import DenseTwin, beside_routed, dense_twin, width_beside
from upcycle.architectures.stored_moe import MoeModel, matrix_of
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.compressing.base import LOSS_WARNING, Compression, CutSizes, stepped
from upcycle.methods.compressing.dense_neurons import fitted_neurons, neuron_scores
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.growing.base import Described, Grown, Piece
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe


class ToDenseParameters(PluginParameters):
    """Parameters of :class:`ToDense`."""

    gather: Literal["neurons", "fitted", "average", "sum", "top_kg", "svd_kg"] = Field(
        "neurons",
        description="what the FFN is made of: the neurons of all experts that add most to the output; those that are left when those "
        "go without which a fit of the others misses least of it (fitted); the average or the sum of the experts; of every expert "
        "equally many neurons, those of the largest weights (top_kg), or directions of the largest singular values (svd_kg)",
    )


class ToDense(Compression):
    """Implements the gathering of OneS (Xue et al. 2022, arXiv 2201.10890), and a ranking of all neurons by what they add.

    With E experts of F neurons, and shared ones, whose neurons run for every token:

    - ``neurons`` (ours): the score of a neuron is ``sum (w h_j)^2 * ||down_j||^2`` over the tokens that chose its expert, with its
      activation h_j and the expert's weight w; of a shared expert's, over all tokens. Those of the largest scores stay, whichever
      expert they are of.
    - ``fitted`` (ours): of the 4,096 neurons of the largest such scores, or of more where the FFN is wider, those that are left when
      those go, in rounds, without which down projections that are fitted to the layer's output on sampled tokens miss least. Experts
      that are alike have a neuron several times, and a dense FFN runs each for every token.
    - ``average``, ``sum``: each matrix is the average, or the sum, of the experts'; the neurons of shared experts stand beside.
    - ``top_kg``: of every expert the same number of neurons, those of the largest norm of all their weights; and all shared ones.
    - ``svd_kg``: of every expert as many directions instead: ``U_r^T [gate, up, down^T]`` of its singular value decomposition.

    Down projections are multiplied by the mean weight of their expert, over all tokens; of an average, by the mean of the sum of
    weights. The refit (``--refit down``) then fits them to the MoE's output.

    Deviations: the paper's experts have no gate; here its row belongs to the neuron. It does not say (in what we could read)
    how the decompositions of two matrices are made to fit: here both, and the gate, are decomposed together, side by side. The
    paper then trains the result towards the MoE; here a closed-form fit takes that place, and training is left to the user.
    """

    name = "to_dense"
    title = "From experts to a dense FFN"
    paper = "https://arxiv.org/abs/2201.10890"
    keys = Compression.keys | {"width", "target"}
    Parameters = ToDenseParameters
    parameters: ToDenseParameters
    dense = True

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the number of neurons of every FFN of the result."""
        shared = {layer: width_beside(model, layer) for layer in model.moe_layers}
        neurons = model.experts * model.expert_width + min(shared.values())
        width = self._asked(model, recipe, neurons, min(shared.values()))
        if width > neurons:
            raise UsageError(
                f"width {width:,} is larger than there are neurons: {model.experts} experts of {model.expert_width:,}"
                + (f", and {min(shared.values()):,} shared" if min(shared.values()) else "")
                + f", are {neurons:,}",
                hint=f"--width {neurons} or less",
            )
        self._check_gathering(model, width, min(shared.values()))
        for layer in range(model.layers):
            if layer not in shared and width_beside(model, layer) != width:
                own = width_beside(model, layer)
                raise RefusalError(
                    f"layer {layer} has no experts, and an FFN of {own:,} neurons; a dense model's FFNs all have one width, and "
                    f"{width:,} are asked for",
                    hint=f"--width {own}" if own else "",
                )
        return width

    def _asked(self, model: MoeModel, recipe: Recipe, neurons: int, shared: int) -> int:
        """Return the width that the recipe says, or that the gathering gives."""
        if recipe.width is not None and recipe.keep is not None:
            raise UsageError(
                "keep and width both say how many neurons every FFN keeps", hint="leave one of --keep and --width out"
            )
        one = model.expert_width + shared
        if recipe.width is not None:
            return recipe.width
        if recipe.keep is None and self.parameters.gather not in ("neurons", "fitted"):
            return one
        if recipe.keep is None:
            raise UsageError(
                "to_dense needs to know how many neurons the FFN of every layer has",
                hint=f"--width {min(neurons, model.top_k * model.expert_width + shared)} is as many as run for a token; "
                "--keep 0.5 is half of all",
            )
        if recipe.keep == 1:
            return neurons
        step = stepped(neurons)
        return max(1, round(recipe.keep * neurons / step)) * step

    def _check_gathering(self, model: MoeModel, width: int, shared: int) -> None:
        """Refuse a width that the gathering cannot give.

        Raises:
            UsageError: it cannot; the message says which it can.
        """
        gather, one = self.parameters.gather, model.expert_width + shared
        if gather in ("average", "sum") and width != one:
            raise UsageError(
                f"the {gather} of the experts has {one:,} neurons, and {width:,} are asked for",
                hint=f"--width {one}, or --param gather=neurons",
            )
        routed = width - shared
        most = model.expert_width
        if gather in ("top_kg", "svd_kg") and (routed % model.experts or not 0 < routed // model.experts <= most):
            near = min(max(round(routed / model.experts), 1), most) * model.experts + shared
            raise UsageError(
                f"{gather} takes equally many of every expert, and {routed:,} cannot be divided among {model.experts} experts of "
                f"{most:,}" + (f" (beside {shared:,} shared)" if shared else ""),
                hint=f"--width {near}, or --param gather=neurons",
            )

    def changed(self, model: MoeModel, keep: int) -> bool:
        """Return true: the architecture is another one."""
        return True

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result as those of a MoE with one expert."""
        return CutSizes(1, 1, keep)

    def before(self, model: MoeModel, keep: int) -> DenseCut:
        """Return a cut of the width that the result will have."""
        return DenseCut(keep)

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        shared = min(width_beside(model, layer) for layer in model.moe_layers)
        neurons = model.experts * model.expert_width + shared
        beside = f" and {shared:,} shared neurons" if shared else ""
        return (
            f"one FFN of {keep:,} neurons runs for every token, in the place of {model.experts} experts, top-{model.top_k}",
            f"FFNs of {keep:,} neurons from {model.experts} experts of {model.expert_width:,}{beside} ({keep / neurons:.0%})",
        )

    def grow(self, source: Described, recipe: Recipe, choice: Any = None) -> Grown:
        """Describe the dense model; ``choice`` are the cuts by layer, None before they are decided."""
        model = MoeModel.read(source.raw, source.specs, source.where)
        # The family comes first: that there is none is worth saying before any width.
        twin = dense_twin(model, model.expert_width, recipe.target, source.made_of, source.where)
        keep = self.kept(model, recipe)
        twin = dense_twin(model, keep, twin.family.name, where=source.where)
        cuts = choice or dict.fromkeys(model.moe_layers, self.before(model, keep))
        gone, summary = self.said(model, keep)
        return Grown(
            config=twin.config,
            pieces=tuple(_pieces(model, twin, cuts)),
            promise=("approximate", gone),
            summary=f"{twin.family.name}, {summary}",
            made={},
            context=model.context,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            tied=model.tied,
            source_idle=model.expert_elements // model.experts * (model.experts - model.top_k),
            warnings=(LOSS_WARNING,),
        )

    def cut(self, source: LayerSource, keep: int) -> DenseCut:
        """See the class."""
        seen, gather = source.seen, self.parameters.gather
        if gather in ("neurons", "fitted"):
            return of_best_neurons(source, keep, gather == "fitted")
        experts, tokens = seen.experts, float(seen.tokens)
        mean = (seen.weight / tokens).tolist()
        shared = FfnPart((Term(SHARED_FFN),), float(seen.shared_weight) / tokens)
        beside = (shared,) if len(seen.shared) else ()
        if gather in ("average", "sum"):
            weight = 1 / experts if gather == "average" else 1.0
            return DenseCut(keep, (FfnPart(tuple(Term(e, weight) for e in range(experts)), sum(mean)), *beside))
        each = (keep - len(seen.shared)) // experts
        if gather == "svd_kg":
            return DenseCut(keep, (*(FfnPart((Term(e),), mean[e], each) for e in range(experts)), *beside))
        parts = []
        for expert in range(experts):
            matrices = source.matrices(expert)
            norms = sum(
                (m.double().square().sum(0 if name == "down" else 1) for name, m in matrices.items()), torch.zeros(())
            )
            parts.append(FfnPart((Term(expert, order=_best(norms, each)),), mean[expert]))
        return DenseCut(keep, (*parts, *beside))


def _best(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Return the places of the largest scores, ascending; of equals the first."""
    return tuple(sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist()))


def of_best_neurons(source: LayerSource, width: int, fitted: bool = False) -> DenseCut:
    """Return the FFN of the neurons, of all experts and shared ones, that add most to a layer's output, or of ``fitted`` ones."""
    tokens = float(source.seen.tokens)
    mean = dict(enumerate((source.seen.weight / tokens).tolist()))
    return DenseCut(
        width, _ranked(source, width, {**mean, SHARED_FFN: float(source.seen.shared_weight) / tokens}, fitted)
    )


def _ranked(source: LayerSource, keep: int, scales: dict[int, float], fitted: bool) -> tuple[FfnPart, ...]:
    """Return the parts of the chosen neurons, in the order of experts; shared ones last."""
    scores = neuron_scores(source)
    every = torch.cat([*scores.values()])
    chosen = fitted_neurons(source, scores, scales, keep).tolist() if fitted else _best(every, keep)
    parts, first = [], 0
    for expert, own in scores.items():
        order = tuple(place - first for place in chosen if first <= place < first + len(own))
        first += len(own)
        if order:
            parts.append(FfnPart((Term(expert, order=order),), scales[expert]))
    return tuple(parts)


_MATRICES: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")


def _pieces(model: MoeModel, twin: DenseTwin, cuts: dict[int, DenseCut]) -> list[Piece]:
    """Return every tensor of the dense model, in the order in which they are written."""
    first = set(twin.family.first_specs(twin.dense))
    outside = twin.outside[None]
    pieces = [Piece("embeddings", None, {name: origin for name, origin in outside.items() if name in first})]
    for layer in range(twin.dense.num_hidden_layers):
        tensors: dict[str, Origin] = dict(twin.outside[layer])
        names = twin.family.ffn_names(layer)
        for part in _MATRICES:
            name = names[part]
            if layer in cuts:
                tensors[name] = DenseMatrix(stored_expert(model, layer, part), layer=layer, part=part, cut=cuts[layer])
            else:
                tensors[name] = Origin(beside_routed(model, layer)[part])
        pieces.append(Piece(f"layer {layer}", layer, tensors))
    rest = {name: origin for name, origin in outside.items() if name not in first}
    return [*pieces, Piece("final norm", None, rest)]


def stored_expert(model: MoeModel, layer: int, part: str) -> str:
    """Return a stored tensor that holds such a matrix of a routed expert."""
    return next(name for name in model.names[layer] if matrix_of(name) in (part, "gate_up" if part != "down" else part))
