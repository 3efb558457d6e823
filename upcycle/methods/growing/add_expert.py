"""Add an expert: the FFNs of a dense fine-tune become one more expert of a Mixture-of-Experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from upcycle.architectures.added_expert import with_expert
from upcycle.architectures.moe.dense_twin import width_beside
from upcycle.architectures.stored_moe import MoeModel
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.growing.base import Described, Grown, Growth, moe_pieces, refuse_groups
from upcycle.plugins import PluginParameters
from upcycle.registry import FAMILIES, TARGETS, load

if TYPE_CHECKING:
    from typing_extensions import Self

    from upcycle.architectures.dense.base import DenseConfig
    from upcycle.checkpoints.mixed_checkpoint import Mix
    from upcycle.recipe.conversion_recipe import Recipe
    from upcycle.recipe.recipe_parts import SourceRecipe

NewRows = dict[int, tuple[float, ...]]
"""By layer the router's row of the new expert, ``[d]``, and behind it its bias, where there are biases."""
_READ = {"name", "revision", "text", "scale"}


class AddExpertParameters(PluginParameters):
    """Parameters of :class:`AddExpert`."""

    sharpness: float = Field(
        2.0,
        gt=0,
        allow_inf_nan=False,
        description="multiplies what the new row adds to the mean of the others': more of its own tokens choose the expert, with more "
        "weight, and fewer others (1: the labels of DUME, which a ridge regression does not reach)",
    )


class AddExpert(Growth):
    """Adds a domain to a MoE as DUME does (arXiv 2603.29765): a dense model's FFNs become one more expert in every layer with experts.

    The model is the recipe's only ``sources`` entry, a fine-tune of what the experts are from. Its FFNs stand behind the experts that
    there are, bit for bit, or with zero neurons behind their own where experts are wider; ``scale`` of the source multiplies what they
    add. Everything else is the MoE's, bit for bit: attention, norms, embeddings, experts, and the rows of its routers. As many
    experts run per token as before, so that a token that does not choose the new one gets what it got, where the weights of
    chosen experts are normalised or sigmoids; in a softmax over all experts the new one takes a share of every weight.

    The new row is fitted, layer after layer, to what the router reads in the extended model: on ``text`` of the source, and on the
    calibration text, which stands for all that the other experts are for. The model itself may write that (``self``).

    Deviations. DUME keeps sums over the text of every domain, ``H^T H`` and ``H^T Y``, adds those of the new domain, and solves for
    all rows anew. A MoE that comes without sums has rows in their place, perhaps trained ones: these stay, and the new row is put
    where the solution for all domains would put it, relative to their mean, times ``sharpness``
    (:func:`upcycle.routers.for_mixing.added_row.fit_row`). Where the old rows are DUME's, it differs from a solution from scratch by
    what that would change of the old rows. Both sides of the text count the same, however many experts there are. Routers with biases
    on the choice give the new expert the mean of these. DUME merges what is no expert by averaging; here it stays the MoE's.
    """

    kind = "addition"
    name = "add_expert"
    title = "Add an expert"
    paper = "https://arxiv.org/abs/2603.29765"
    takes = "moe"
    takes_sources = True
    calibrated = True
    keys = frozenset({"calibration", "dtype"})
    decides = "rows"
    next_step = "upcycle evaluate {out} --reference {source}"
    Parameters = AddExpertParameters
    parameters: AddExpertParameters

    def joined(self, mix: Mix | None, recipe: Recipe) -> Self:
        """Return the method itself, if the recipe names one fine-tune.

        Raises:
            UsageError: it names none or several, or says of it what is not read here.
        """
        fine_tune(recipe)
        return self

    @property
    def text_for(self) -> str | None:
        """What calibration text is needed for."""
        return "the router's row of a new expert"

    def grow(self, source: Described, recipe: Recipe, choice: Any = None) -> Grown:
        """Describe the result; ``choice`` is a :data:`NewRows`, None before it is decided. See :meth:`Growth.grow`."""
        model = MoeModel.read(source.raw, source.specs, source.where)
        assert source.added is not None
        check_can_be_expert(model, source, source.added)
        told, experts = fine_tune(recipe), model.experts + 1
        one, rows = model.expert_elements // model.experts, choice or {}
        made = {layer: _tensors(model, layer, rows.get(layer, ()), told.scale) for layer in model.moe_layers}
        return Grown(
            config=model.config_with(experts, model.top_k),
            pieces=tuple(moe_pieces(model, made)),
            promise=("approximate", "tokens may choose the added expert in the place of one that they had"),
            summary=f"{experts} experts from {model.experts}, top-{model.top_k}: one is a dense model's FFN",
            made={"rows": {str(layer): list(row) for layer, row in rows.items()}},
            context=model.context,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            tied=model.tied,
            idle=one * (experts - model.top_k),
            source_idle=one * (model.experts - model.top_k),
            warnings=tuple(_warnings(model, source)),
        )

    def memory(self, source: Described, recipe: Recipe) -> int:
        """Return the bytes that fitting the rows takes: a layer before and after, the stream, its inputs, and products of these."""
        model = MoeModel.read(source.raw, source.specs, source.where)
        sizes = {layer: sum(model.specs[name].elements for name in names) for layer, names in model.names.items()}
        layers = [size for layer, size in sizes.items() if layer is not None]
        more = model.expert_elements // (model.experts * max(1, len(model.moe_layers)))
        tokens = 2 * recipe.calibration.tokens
        numbers = 2 * (max(layers) + more) + sizes[None] + tokens * (2 * model.hidden_size + model.experts + 1)
        return 4 * numbers + 8 * 6 * model.hidden_size**2


def fine_tune(recipe: Recipe) -> SourceRecipe:
    """Return the model whose FFNs become an expert.

    Raises:
        UsageError: the recipe names none or several, or says of it what is not read here, or has no text of its kind.
    """
    example = "--sources ./law --set sources.0.text=law.txt"
    if not recipe.sources:
        raise UsageError(
            f"sources: {recipe.method} adds the FFNs of a dense model, and none is named",
            hint=example,
        )
    if len(recipe.sources) > 1:
        raise UsageError(
            f"sources: {recipe.method} adds the FFNs of one dense model, and {len(recipe.sources)} models are named",
            hint=f"one at a time, each added to the result before: {example}",
        )
    (told,) = recipe.sources
    usual = type(told)(name=told.name)  # a recorded recipe names what was left at its default, too
    if odd := sorted(
        name for name in type(told).model_fields if name not in _READ and getattr(told, name) != getattr(usual, name)
    ):
        raise UsageError(
            f"sources: {told.name} has '{odd[0]}', which {recipe.method} does not read",
            hint=f"leave it out; it reads {', '.join(sorted(_READ))}",
        )
    if not told.texts:
        raise UsageError(
            f"sources: {told.name} has no 'text': the router has to learn which tokens are for the new expert",
            hint=f"a text of the kind that it was trained on: {example}",
        )
    if both := sorted({*told.texts} & {*recipe.calibration.texts}):
        raise UsageError(
            f"sources: the text {both[0]} of {told.name} is a calibration text, too: the router cannot tell its tokens from others",
            hint="calibrate on texts that are for the experts that there are",
        )
    return told


def check_can_be_expert(model: MoeModel, source: Described, added: Described) -> None:
    """Refuse a dense model whose FFNs cannot be experts of a MoE.

    Raises:
        UsageError: sizes or activations differ; the message names the key and both values.
        RefusalError: the model is not dense, its FFN is of another form, or its block is another one.
    """
    from upcycle.checkpoints.find_family import family_of

    family = family_of(added.raw, added.where)
    family.check_known_whole(AddExpert.name)
    dense = family.config(added.raw, f"{added.where}: config.json")
    if family.tower_specs(dense):
        raise RefusalError(
            f"{added.where} is a '{family.name}' model of several parts, and the FFNs of a text model are needed",
            hint="name a text model",
        )
    moe = model.family.name
    refuse_groups(model, AddExpert.name)
    if model.family.clamped:
        raise RefusalError(
            f"{source.where}: the experts of a '{moe}' model have biases and a clamped activation, and no dense model known here has "
            "such FFNs",
            hint="--method expert_upcycling copies experts that it has",
        )
    able = [name for name in FAMILIES if moe in load("family", name).targets] if moe in TARGETS else []
    if able and family.name not in able:
        raise RefusalError(
            f"{added.where} is a '{family.name}' model, whose block is not that of the '{moe}' model {source.where}",
            hint=f"FFNs of these can be experts of it: {', '.join(able)}",
        )
    stock = model.stock
    pairs = (
        ("hidden_size", model.hidden_size, dense.hidden_size),
        ("num_hidden_layers", model.layers, dense.num_hidden_layers),
        ("vocab_size", model.vocab_size, dense.vocab_size),
        ("residual_multiplier", float(getattr(stock, "residual_multiplier", None) or 1.0), dense.residual_multiplier),
    )
    for key, ours, theirs in pairs:
        if ours != theirs:
            raise UsageError(
                f"sources differ: config.json's '{key}' is {ours} in {source.where} and {theirs} in {added.where}",
                hint="an expert is added from a fine-tune of the model that the experts are from",
            )
    for layer in model.moe_layers:
        _check_ffn(model, source, added, dense.at(layer), layer)


def _check_ffn(model: MoeModel, source: Described, added: Described, dense: DenseConfig, layer: int) -> None:
    if dense.hidden_act != model.activation:
        raise UsageError(
            f"sources differ: config.json's 'hidden_act' is {model.activation} in {source.where} and {dense.hidden_act} in "
            f"{added.where}",
            hint="all experts have one activation: no other fine-tune fits",
        )
    if dense.mlp_bias or not dense.mlp_gated:
        form = "biases" if dense.mlp_bias else "no gate"
        raise RefusalError(f"layer {layer}: the FFN of {added.where} has {form}, and experts of {source.where} do not")
    if dense.intermediate_size > model.expert_width:
        raise UsageError(
            f"layer {layer}: the FFN of {added.where} has {dense.intermediate_size} neurons, and experts of {source.where} have "
            f"{model.expert_width}",
            hint="add it to a MoE whose experts are whole FFNs (branch_train_mix), or make the FFN narrower first: "
            f"upcycle compress MODEL NARROW --method modegpt --width {model.expert_width}",
        )


def _warnings(model: MoeModel, source: Described) -> list[str]:
    found = []
    if any(width_beside(model, layer) for layer in model.moe_layers):
        found.append(
            "the MoE has shared experts, which are on beside the added one: a whole FFN beside them adds to the stream twice, until "
            "the model is trained"
        )
    factor = float(getattr(model.stock, "routed_scaling_factor", None) or 1.0)
    if not model.normalized or factor != 1:
        sums = "do not sum to 1" if not model.normalized else f"sum to {factor:g}"
        found.append(
            f"the weights of a token's experts {sums} in this MoE: a whole FFN may count too little or too much; sources.0.scale "
            "multiplies what it adds"
        )
    return found


def _tensors(model: MoeModel, layer: int, row: tuple[float, ...], scale: float) -> dict[str, Origin]:
    """Return the tensors of a layer with experts; ``row`` is empty before it is decided."""
    return dict(with_expert(model, layer, row[: model.hidden_size], row[model.hidden_size :], scale))
