"""Stock model classes whose FFNs are replaced by experts as soon as they are built."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from torch import nn

from upcycle.errors import CheckpointError, UsageError
from upcycle.models.own.adapted_ffn import AdaptedFfn, adapted_ffns_in
from upcycle.models.own.attention_received import watch_attention
from upcycle.models.own.instructions import add_clusters
from upcycle.models.own.lora_block import LoraBlock
from upcycle.models.own.moe_block import DOWN_WEIGHTS, IMPLEMENTATIONS, MoeBlock, PackedExperts
from upcycle.models.own.replaced_ffn import ReplacedFfn, replaced_in
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule
from upcycle.models.own.slot_ffn import SlotFfn, slot_ffns_in
from upcycle.models.own.slots import SlotBlock
from upcycle.models.own.token_mask import check_not_causal, watch_masks

_DECODER_START = "_prepare_decoder_input_ids_for_generation"


@cache
def wrapped_model_class(stock: Any, config_class: Any) -> Any:
    """Return the class ``UpcycleMoe<Stock>``: the stock one, whose FFNs are swapped right after construction.

    Args:
        stock: a class of transformers.
        config_class: the configuration class of the wrapped model.
    """

    @wraps(stock.__init__)  # vLLM reads the signature of what it builds
    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        replace_ffns(self, config)

    def decoder_start(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Let stock code ask for the base's ``model_type``, by which it tells how Whisper's prompts begin."""
        own, self.config.model_type = self.config.model_type, self.config.base_model_type
        try:
            return getattr(stock, _DECODER_START)(self, *args, **kwargs)
        finally:
            self.config.model_type = own

    own = {
        "__init__": build,
        "__module__": __name__,
        "__doc__": f"{stock.__name__} with experts in the place of FFNs.",
        "config_class": config_class,
        "set_experts_implementation": _set_experts_implementation,
    }
    if hasattr(stock, _DECODER_START):
        own[_DECODER_START] = decoder_start
    made = type(stock)(f"UpcycleMoe{stock.__name__}", (stock,), own)
    _rename_as(made, stock, config_class.base_model_type)
    return made


def _rename_as(wrapped: Any, stock: Any, base: str) -> None:
    """Let weights of the wrapped class be renamed as the stock one's are, when they are loaded and when they are saved.

    transformers finds these rules by the names of classes and the ``model_type``, of a model and of every model inside it. Those
    of the stock classes inside it apply anyway; without the outermost one's, names would be changed on one way alone.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    rules = get_checkpoint_conversion_mapping(stock.__name__) or get_checkpoint_conversion_mapping(base)
    if rules:
        register_checkpoint_conversion_mapping(wrapped.__name__, rules, overwrite=True)


def replace_ffns(model: Any, config: Any) -> None:
    """Put experts in the place of the FFNs that a configuration names.

    Parts of the base model that a class does not have (the decoder, in a class of the encoder alone) are passed over.

    Args:
        model: a stock model, with its FFNs.
        config: its configuration.

    Raises:
        CheckpointError: a module does not exist, has another size, or is causal where its rule is not.
    """
    base = model.base_model
    placed = 0
    adapted = adapted_ffns_in(config)
    wanted: list[ReplacedFfn | SlotFfn | AdaptedFfn] = [*replaced_in(config), *slot_ffns_in(config), *adapted]
    for ffn in wanted:
        for modules in ffn.paths:
            if not hasattr(base, modules[0].partition(".")[0]):
                continue
            for path in modules:
                _check_module(base, path, config)
            _check_size(base.get_submodule(modules[0]), modules[0], ffn.hidden_size)
            if isinstance(ffn, AdaptedFfn):
                _put(base, modules[0], LoraBlock(ffn, base.get_submodule(modules[0])))
                placed += 1
                continue
            if isinstance(ffn, SlotFfn) or not ffn.rule.per_token:
                check_not_causal(base, modules[0], "slots" if isinstance(ffn, SlotFfn) else ffn.rule.name)
            if _kept_in_fp32(model, base, modules):
                model._keep_in_fp32_modules |= set(DOWN_WEIGHTS)
            _keep_bias_in_fp32(model, ffn)
            _put(base, modules[0], SlotBlock(ffn) if isinstance(ffn, SlotFfn) else MoeBlock(ffn))
            for path in modules[1:]:
                _put(base, path, nn.Identity())
            placed += 1
    watch_masks(model)
    watch_attention(model)
    add_clusters(model, adapted)
    if wanted and not placed:
        first = wanted[0].paths[0][0]
        raise CheckpointError(
            f"config.json: 'replaced_ffns' names '{first}', and a {type(model).__name__} has no part of that name",
            hint="paths begin below the base model: compare 'replaced_ffns' with 'base_model_type'",
        )


def _check_module(base: nn.Module, path: str, config: Any) -> None:
    parent, _, leaf = path.rpartition(".")
    try:
        holder = base.get_submodule(parent)
        there = leaf in holder._modules or callable(holder.__dict__.get(leaf))  # an activation may be a plain function
    except AttributeError:
        there = False
    if not there:
        raise CheckpointError(
            f"config.json: 'replaced_ffns' names the module '{path}', which a {config.base_model_type} model does not have",
            hint="compare it with the number of layers in config.json",
        )


def _check_size(module: nn.Module, path: str, hidden: int) -> None:
    """Compare the length of the vectors that an FFN reads with ``hidden``; it is a side of one of its matrices."""
    weights = [weight for weight in module.parameters() if weight.ndim == 2]
    if weights and not any(hidden in weight.shape for weight in weights):
        raise CheckpointError(
            f"config.json: 'replaced_ffns' says that '{path}' reads vectors of 'hidden_size' {hidden}, and the base model's matrix "
            f"there is {list(weights[0].shape)}",
            hint="correct 'hidden_size' in 'replaced_ffns', or the base model's own sizes",
        )


def _kept_in_fp32(model: Any, base: nn.Module, modules: tuple[str, ...]) -> bool:
    """Return whether the stock class keeps a projection of an FFN in fp32 when it is loaded in fp16: T5's second one overflows."""
    kept = set(model._keep_in_fp32_modules or ())
    inside = (f"{path}.{name}" for path in modules for name, _ in base.get_submodule(path).named_modules())
    return any(kept & set(name.split(".")) for name in inside)


def _keep_bias_in_fp32(model: Any, ffn: ReplacedFfn | SlotFfn) -> None:
    """Keep what a router adds to its scores in fp32 when the model is loaded in half precision, as stock classes do."""
    if isinstance(ffn, ReplacedFfn) and isinstance(ffn.rule, BiasedTopKRule) and ffn.rule.biased:
        model._keep_in_fp32_modules_strict |= {"e_score_correction_bias"}


def _put(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(base.get_submodule(parent), leaf, module)


def _set_experts_implementation(self: Any, experts_implementation: str) -> None:
    """Choose how experts are computed: ``upcycle`` (kernels, where they know the activation) or ``eager``, one after another."""
    if experts_implementation not in IMPLEMENTATIONS:
        raise UsageError(
            f"experts_implementation is '{experts_implementation}'", hint=f"one of: {', '.join(IMPLEMENTATIONS)}"
        )
    for module in self.modules():
        if isinstance(module, PackedExperts):
            module.implementation = experts_implementation
