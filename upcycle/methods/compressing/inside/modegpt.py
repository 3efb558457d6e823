"""Makes a dense model narrower, module by module: neurons of its FFNs, dimensions of its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.dense.narrowed import (
    KeptPairs,
    NarrowSizes,
    made_tensors,
    narrowed_config,
    why_heads_stay,
)
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.compressing.base import LOSS_WARNING, stepped
from upcycle.methods.growing.base import Described, Grown, Growth, Piece
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch


class ModeGptParameters(PluginParameters):
    """Parameters of :class:`ModeGpt`."""

    heads: float = Field(
        1.0,
        gt=0,
        le=1,
        description="the part of the dimensions of every head that is kept, of queries and keys (pairs that turn together) and of "
        "values; 1 leaves attention as it is",
    )
    score: Literal["leverage", "missed"] = Field(
        "missed",
        description="which neurons stay: leverage: those that the others can replace least (the paper's); missed: those without which "
        "the refitted others miss most of the FFN's output",
    )
    ridge: float = Field(1e-4, gt=0, description="the regularisation, relative to the mean square of an activation")


class ModeGpt(Growth):
    """Implements MoDeGPT (Lin et al. 2024, arXiv 2408.09632): every module is approximated by a smaller one of the same form.

    - Type I, FFN: the neurons of the largest ridge leverage are kept (``score=leverage``), and down is
      ``(S^T C S + r I)^-1 S^T C W`` (Nystrom).
    - Type II, queries and keys: the dimensions of the largest ``||C_Q^(1/2)[:, i]|| ||C_K^(1/2)[:, i]||`` are kept.
    - Type III, values and outputs: the leading directions of ``C^(1/2) W_V W_O``, head by head.

    After each, the refit (``--refit down``) fits the output projection, or down, to what the dense model's stream still lacks, layer
    after layer: the paper has no such step.

    Leverage does not see what the down projection makes of a neuron. ``score=missed`` (ours) does, and is what is used unless asked
    otherwise: see :func:`~upcycle.methods.compressing.leverage.least_missed`.

    Further deviations, for the sake of a stock model:

    - A class has one ``intermediate_size`` and one ``head_dim``, so that all layers are cut alike. The paper gives every layer a
      sparsity of its own, by block influence.
    - ``head_dim`` is that of queries, keys and values: types II and III keep equally many.
    - A rotary embedding has the same frequencies in all heads and layers. So the same pairs are kept in all, those of the largest
      sum of scores, and the heads that share keys share them, too; ``rope_type: longrope`` holds their frequencies. The paper
      chooses per head, which needs code of its own. Hence ``heads`` is 1 unless asked for.
    - Heads that share values (GQA) share their directions: those of all their output projections side by side.
    - Nystrom's inverse is regularised (the paper: a pseudo-inverse).
    """

    name = "modegpt"
    title = "MoDeGPT: narrower FFNs and heads"
    paper = "https://arxiv.org/abs/2408.09632"
    kind = "narrowing"
    calibrated = True
    keys = frozenset({"keep", "calibration", "refit", "dtype"})
    next_step = "upcycle evaluate {out} --reference {source}"
    Parameters = ModeGptParameters
    parameters: ModeGptParameters

    def sizes(self, family: Family, dense: DenseConfig, source: Described, recipe: Recipe) -> NarrowSizes:
        """Return the sizes of the result.

        Raises:
            UsageError: the recipe does not say, or nothing would be smaller.
            RefusalError: the heads of this model cannot be cut.
        """
        width, part = dense.intermediate_size, recipe.keep
        if part is None:
            raise UsageError(
                "modegpt needs to know how many neurons every FFN keeps",
                hint="--keep 0.75; --param heads=0.75 cuts the heads, too",
            )
        step = stepped(width)
        kept = width if part == 1 else max(1, round(part * width / step)) * step
        if kept >= width and part < 1:
            raise UsageError(
                f"keep {part:g} of {width} neurons is {kept}, rounded to a multiple of {step}: nothing would be smaller",
                hint=f"--keep {(width - step) / width:.4g} or less"
                if width > step
                else "FFNs of so few neurons stay as they are",
            )
        return NarrowSizes(kept, self._head(family, dense, source))

    def _head(self, family: Family, dense: DenseConfig, source: Described) -> int:
        part, head = self.parameters.heads, dense.head_dim
        if part == 1:
            return head
        if why := why_heads_stay(family, dense, source.raw):
            raise RefusalError(
                f"{source.where}: the heads of a '{family.name}' model cannot be made narrower: {why}",
                hint="leave --param heads out: the FFNs can",
            )
        step = 8 if head >= 32 and head % 8 == 0 else 2
        kept = max(1, round(part * head / step)) * step
        if kept >= head:
            raise UsageError(
                f"heads {part:g} of {head} dimensions is {kept}, rounded to a multiple of {step}: nothing would be smaller",
                hint=f"--param heads={(head - step) / head:.4g} or less" if head > step else "leave --param heads out",
            )
        return kept

    def neurons(self, gram: torch.Tensor, down: torch.Tensor, count: int) -> torch.Tensor:
        """Return the neurons that stay, int64 ``[count]``, ascending.

        Args:
            gram: the products of their activations, ``[F, F]``.
            down: ``[d, F]``.
            count: how many stay.
        """
        from upcycle.methods.compressing.leverage import least_missed, ridge_leverage

        if self.parameters.score == "missed":
            return least_missed(gram, down, count, self.parameters.ridge)
        best = ridge_leverage(gram, self.parameters.ridge).sort(descending=True, stable=True).indices
        return best[:count].sort().values

    def grow(self, source: Described, recipe: Recipe, choice: Any = None) -> Grown:
        """Describe the narrower model; ``choice`` are the :class:`KeptPairs`, None before they are chosen."""
        family, dense = dense_of(source, self.name)
        sizes = self.sizes(family, dense, source, recipe)
        same = sizes == NarrowSizes(dense.intermediate_size, dense.head_dim)
        first, outside = family.first_specs(dense), family.stored_specs(dense, None)
        pieces = [Piece("embeddings", None, _written(family, dense, {name: Origin(name) for name in first}))]
        for layer in range(dense.num_hidden_layers):
            origins: dict[str, Origin] = {name: Origin(name) for name in family.stored_specs(dense, layer)}
            origins |= made_tensors(family, dense, layer, sizes)
            pieces.append(Piece(f"layer {layer}", layer, _written(family, dense, origins)))
        rest = {name: Origin(name) for name in outside if name not in first}
        pieces.append(Piece("final norm", None, _written(family, dense, rest)))
        gone, summary = _said(dense, sizes)
        return Grown(
            config=narrowed_config(family, dense, source.raw, sizes, choice or KeptPairs.first(sizes.head)),
            pieces=tuple(pieces),
            promise=("exact", "nothing is cut") if same else ("approximate", gone),
            summary=summary,
            made={},
            context=dense.max_position_embeddings,
            vocab_size=dense.vocab_size,
            hidden_size=dense.hidden_size,
            tied=dense.tie_word_embeddings,
            warnings=() if same else (LOSS_WARNING,),
        )

    def memory(self, source: Described, recipe: Recipe) -> int:
        """Return the bytes that the walk through both models takes: a layer of each, streams, and the products of neurons."""
        _, dense = dense_of(source, self.name)
        layer = sum(spec.elements for name, spec in source.specs.items() if ".0." in name)
        outside = 2 * dense.vocab_size * dense.hidden_size
        streams = 4 * recipe.calibration.tokens * dense.hidden_size
        return 4 * (2 * layer + outside + streams) + 40 * dense.intermediate_size**2


def dense_of(source: Described, method: str) -> tuple[Family, DenseConfig]:
    """Return the architecture of a text model that can be made narrower, and its configuration.

    Raises:
        RefusalError: it cannot.
    """
    from upcycle.checkpoints.find_family import family_of

    family = family_of(source.raw, source.where)
    family.check_known_whole(method)
    dense = family.config(source.raw)
    paths = family.module_paths
    why = family.uncalibrated
    if family.tower_specs(dense) or family.parts:
        why = "it has other parts beside its text model"
    elif family.encoder or paths.closing or paths.ends:
        why = "its layers are not those of a decoder whose FFN is one module"
    if why:
        raise RefusalError(
            f"{method} does not take a '{family.name}' model: {why}",
            hint="--method static_prune makes the FFNs of most models narrower (upcycle convert)",
        )
    return family, dense


def _written(family: Family, dense: DenseConfig, origins: dict[str, Origin]) -> dict[str, Origin]:
    return {family.written(dense, name): origin for name, origin in origins.items()}


def _said(dense: DenseConfig, sizes: NarrowSizes) -> tuple[str, str]:
    """Return what is gone, and what the result is."""
    width, head, gone, left = (
        dense.intermediate_size,
        dense.head_dim,
        [],
        [f"FFNs of {sizes.width:,} neurons from {dense.intermediate_size:,}"],
    )
    if sizes.width != width:
        gone.append(f"{width - sizes.width:,} of {width:,} neurons are gone from every FFN")
    if sizes.head != head:
        gone.append(f"{head - sizes.head} of {head} dimensions are gone from every head")
        left.append(f"heads of {sizes.head} dimensions from {head}")
    return "; ".join(gone), ", ".join(left)
