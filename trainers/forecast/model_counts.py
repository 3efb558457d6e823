"""Sizes of the parts of a model, from its configuration alone, for forecasts of training. F intermediate, E experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import empty_model
from upcycle.architectures.towers.composite import refuse_parts
from upcycle.files.formats.settings import base_type
from upcycle.models.experts import use_experts
from upcycle.trainers.adapting.targets import add_adapter
from upcycle.trainers.forecast.flops import TrainingFlops, training_flops
from upcycle.trainers.optimizing.parameter_groups import ParameterPart, parts, select
from upcycle.trainers.recipe.adapter_recipe import AdapterRecipe
from upcycle.trainers.routing.stock_routers import moe_layers


@dataclass(frozen=True)
class Weight:
    """One parameter: how many elements it has, its part of the model, whether it trains, and the module it is fetched with.

    Parameters with the same ``fetched_with`` are gathered together by ZeRO-3. ``layer``: the decoder layer that it is in, if any.
    """

    name: str
    elements: int
    part: ParameterPart
    trained: bool
    fetched_with: str
    layer: int | None = None

    @property
    def divided(self) -> bool:
        """Whether expert parallelism divides it among ranks."""
        return self.part == "experts"


@dataclass(frozen=True)
class LayerCounts:
    """Widths of one decoder layer. ``shared`` is F of what is always active: a dense FFN, or shared experts."""

    queries: int
    keys: int  # the width of keys, and of values
    shared: int
    experts: int = 0
    top_k: int = 0
    width: int = 0  # F of one expert
    normed: bool = False  # whether queries and keys have norms


@dataclass(frozen=True)
class ModelCounts:
    """The numbers of a model that forecasts need."""

    model_type: str
    hidden: int
    vocabulary: int
    weights: tuple[Weight, ...]
    layers: tuple[LayerCounts, ...]
    flops: TrainingFlops
    implementation: str  # of the experts

    @property
    def experts(self) -> int:
        """Experts in the first MoE layer; 0 in a dense model."""
        return next((layer.experts for layer in self.layers if layer.experts), 0)

    @property
    def moe_layers(self) -> tuple[LayerCounts, ...]:
        """The layers with routed experts."""
        return tuple(layer for layer in self.layers if layer.experts)

    @property
    def elements(self) -> int:
        """Number of all parameters."""
        return sum(weight.elements for weight in self.weights)

    @property
    def largest_part(self) -> int:
        """Elements of the largest decoder layer, or of the largest weight outside the layers, if that has more."""
        sizes: dict[int | str, int] = {}
        for weight in self.weights:
            key = weight.name if weight.layer is None else weight.layer
            sizes[key] = sizes.get(key, 0) + weight.elements
        return max(sizes.values(), default=0)

    @property
    def active(self) -> int:
        """Number of parameters that one token uses."""
        idle = sum(3 * (layer.experts - layer.top_k) * layer.width * self.hidden for layer in self.layers)
        return self.elements - idle


def count_model(
    raw: Mapping[str, Any],
    where: str,
    length: int,
    trained: Sequence[str] = ("all",),
    experts: str = "auto",
    device: str = "cuda",
    adapter: AdapterRecipe | None = None,
) -> ModelCounts:
    """Count the parts of a model, by building its stock class without memory for its weights.

    Args:
        raw: the content of its ``config.json``.
        where: what errors call it.
        length: tokens per row, which attention's operations depend on.
        trained: what trains, in the words of a stage's ``train``.
        experts: transformers' implementation of experts, or ``auto``: the one that training takes on ``device``.
        device: ``cuda`` or ``cpu``.
        adapter: what trains in the place of the model's weights, if that is so.

    Raises:
        CheckpointError: transformers does not know the model.
        UsageError: a word of ``trained`` matches nothing, or there is no such implementation.
    """
    refuse_parts(base_type(raw), "the forecast counts text models alone; upcycle train takes it")
    model = empty_model(raw, where)
    use_experts(model, experts, device)
    if adapter is not None:
        add_adapter(model, adapter, 0)
    select(model, trained)
    belongs = parts(model)
    blocks = {id(layer.block) for layer in moe_layers(model)}
    leaves = [f"{name}." for name, module in model.named_modules() if id(module) in blocks]
    paths = module_paths_of(model.config)
    weights = tuple(
        Weight(
            name,
            parameter.numel(),
            belongs[name],
            parameter.requires_grad,
            next((leaf for leaf in leaves if name.startswith(leaf)), name.rpartition(".")[0]),
            paths.layer_of(name),
        )
        for name, parameter in model.named_parameters()
    )
    return ModelCounts(
        model_type=model.config.model_type,
        hidden=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        weights=weights,
        layers=_layers(model),
        flops=training_flops(model, length),
        implementation=getattr(model.config, "_experts_implementation", None) or "eager",
    )


def _layers(model: Any) -> tuple[LayerCounts, ...]:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    queries, keys = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    routed = {layer.index: layer for layer in moe_layers(model)}
    paths = module_paths_of(config)
    found = []
    for index, layer in enumerate(paths.layers_in(model)):
        moe = routed.get(index)
        apart = {id(each) for module in (moe.experts, moe.router) for each in module.parameters()} if moe else set()
        held = [each for block in paths.blocks_in(layer) for each in block.parameters()]
        always = sum(each.numel() for each in held if each.dim() > 1 and id(each) not in apart)
        shared = always // (3 * config.hidden_size)
        normed = any(name.endswith(("q_norm", "q_layernorm", "query_layernorm")) for name, _ in layer.named_modules())
        if moe is None:
            found.append(LayerCounts(queries, keys, shared, normed=normed))
            continue
        inside = sum(each.numel() for each in moe.experts.parameters() if each.dim() > 2)
        width = inside // (3 * moe.rule.experts * config.hidden_size)
        found.append(LayerCounts(queries, keys, shared, moe.rule.experts, moe.rule.top_k, width, normed))
    return tuple(found)
