"""Where a stock MoE model keeps its routers, and what each makes of its logits. T tokens, E experts, K top-k."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from inspect import signature
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from upcycle.architectures.module_paths import ModulePaths, module_paths_in, module_paths_of, text_config
from upcycle.architectures.moe.base import Score, Target
from upcycle.architectures.moe_families import MOES
from upcycle.errors import UsageError
from upcycle.files.formats.settings import base_type
from upcycle.models.experts import has_experts
from upcycle.models.own.moe_block import RoutedBlock
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule
from upcycle.models.own.routing.skip import SkipRule
from upcycle.models.own.routing.standardized import StandardizedTopKRule
from upcycle.models.own.routing.tempered import TemperedRule
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.registry import find
from upcycle.trainers.distributed.expert_parallel import is_parallel
from upcycle.trainers.routing.all_parts import ModelPart, part_name, reads_images
from upcycle.trainers.routing.routing_rule import RoutingRule
from upcycle.trainers.routing.varying_rules import varying_rule

_SCORES: tuple[Score, ...] = ("softmax", "sigmoid")
_ASKED = 64  # random tokens that an unknown router is asked about


@dataclass(frozen=True)
class RouterPlace:
    """Where one router of a stock model is: the layer's index, the block with the experts, and the router in it.

    ``part`` is the part of the model that it is in.

    ``beside`` are blocks whose outputs are added to this one's: shared experts, in some architectures. DeepSpeed's AutoEP
    replaces blocks by its own: ``parallel``. Their experts are divided among ranks.
    """

    index: int
    block: nn.Module
    router: nn.Module
    beside: tuple[nn.Module, ...]
    part: ModelPart = field(default="language", kw_only=True)

    @property
    def parallel(self) -> bool:
        """Whether this rank has only some of the experts."""
        return is_parallel(self.block)

    @property
    def experts(self) -> nn.Module:
        """The routed experts, fused as transformers 5 holds them."""
        experts: nn.Module = self.block.get_submodule("experts")
        return experts

    @property
    def count(self) -> int:
        """How many routed experts there are on all ranks together."""
        if isinstance(self.block, RoutedBlock):
            return int(self.block.experts.count)
        weight: Any = next(self.router.parameters())
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 keeps the weight itself elsewhere


@dataclass(frozen=True)
class MoeLayer(RouterPlace):
    """One MoE layer of a stock model, with the rule that its router follows."""

    rule: RoutingRule


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Every MoE layer of a stock causal language model, in order: none of a dense one, nor where routers cannot be read.

    A target's layers are where it says; in any other model they are looked for, and every router is asked what it does.

    Raises:
        UsageError: a target's router chooses experts within groups.
    """
    target = find("target", _model_type(model))
    if target is None:
        return _other_layers(model)
    return [
        MoeLayer(place.index, place.block, place.router, place.beside, _rule(target, place))
        for place in _places(model, target)
    ]


def find_routers(model: nn.Module) -> list[RouterPlace]:
    """Where the routers of a model are, for who reads their choices alone: those that choose within groups are here, too."""
    target = find("target", _model_type(model))
    if target is not None:
        return _places(model, target)
    return [*_own_places(model)] or [*_other_layers(model)]


def require_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """The same, for what is of no use without one.

    Raises:
        UsageError: there is none, its routers cannot be read, or they choose within groups.
    """
    if layers := moe_layers(model):
        return layers
    reason = unread(model) or f"{_model_type(model)} model without a single MoE layer"
    raise UsageError(reason, hint="upcycle convert makes a MoE of a dense model")


def unread(model: nn.Module) -> str | None:
    """Why the routers of a model that has experts cannot be read; ``None`` if they can, or it is dense."""
    if not has_experts(model) or moe_layers(model):
        return None
    return (
        f"{_model_type(model)} has experts, but what its routers do is none of the rules known here (softmax or sigmoid, then "
        "the top k, with or without a bias on the choice)"
    )


def unread_warning(model: nn.Module) -> str | None:
    """What training lacks where :func:`unread` gives a reason."""
    reason = unread(model)
    return f"{reason}: it trains as it is, without balance, load, alarms and router rates" if reason else None


def untaught_warning(model: nn.Module) -> str | None:
    """Say that routers are to train, and that no loss on the tokens reaches them, as their experts' weights are constant."""
    untaught = [layer for layer in moe_layers(model) if layer.rule.constant is not None and not sampling_noise(layer)]
    if not any(weight.requires_grad for layer in untaught for weight in layer.router.parameters()):
        return None
    if isinstance(untaught[0].block, RoutedBlock):
        return (
            f"chosen experts of this {_model_type(model)} model always weigh {untaught[0].rule.constant:g} (scores: ones), so that no "
            "gradient of the loss on tokens reaches the routers, and only auxiliary losses move them; train: [experts, rest] leaves "
            "them as they are"
        )
    return (
        f"{_model_type(model)} with router_jitter_noise 0: chosen experts always weigh {untaught[0].rule.constant:g}, so that no "
        "gradient of the loss on tokens reaches the routers, and only auxiliary losses move them; train: [experts, rest] "
        "leaves them as they are, and router_jitter_noise 0.01 in config.json, with which Phi-3.5-MoE was trained, teaches "
        "them (the model is not the dense function then)"
    )


def sampling_noise(layer: MoeLayer) -> float:
    """How far below the best a logit may lie and still be drawn in training (SparseMixer); 0 where routers draw nothing."""
    return float(getattr(layer.router, "router_jitter_noise", 0.0))


def _places(model: nn.Module, target: Target) -> list[RouterPlace]:
    found = []
    paths = module_paths_in(model)
    for index, layer in enumerate(paths.layers_in(model)):
        blocks = paths.blocks_in(layer)
        if blocks and hasattr(blocks[0], "experts"):
            block, *beside = blocks
            router: Any = block.router if is_parallel(block) else getattr(block, target.router)
            found.append(RouterPlace(index, block, router, tuple(beside)))
    return found


def selection_bias(block: nn.Module, router: nn.Module) -> torch.Tensor | None:
    """The tensor that is added to the scores for the choice alone, wherever the architecture keeps it; no gradient reaches it."""
    for holder, name in (
        (router, "e_score_correction_bias"),
        (getattr(router, "moe_statics", None), "e_score_correction_bias"),
        (block, "e_score_correction_bias"),
        (block, "expert_bias"),
    ):
        bias = getattr(holder, name, None)
        if isinstance(bias, torch.Tensor):
            return bias
    return None


def bias_argument(router: nn.Module) -> str | None:
    """The argument by which a router's ``forward`` is handed that tensor, where its block keeps it (LFM2, MiniMax); ``None``: none."""
    named = signature(type(router).forward).parameters
    return next((name for name in ("e_score_correction_bias", "expert_bias") if name in named), None)


def _blocks(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """Layer and module of everything that has fused experts ``[E, ...]`` as a child, whatever it is called."""
    found: list[tuple[int, nn.Module]] = []
    for name, module in model.named_modules():
        experts = dict(module.named_children()).get("experts")
        if experts is not None and any(weight.dim() > 2 for weight in experts.parameters(recurse=False)):
            found.append((_number(name, len(found)), module))
    return found


def _number(name: str, otherwise: int) -> int:
    return int(next((part for part in name.split(".") if part.isdigit()), otherwise))


def _own_places(model: nn.Module) -> list[RouterPlace]:
    """Where the routers of a model of upcycle's own class are; of a model of parts, those of its text model, if data are text.

    Layers of two towers, or of stages, are numbered through, as a conversion numbers them. Those of attention's projections are
    none of them: they predict norms, and no loss here is about these.
    """
    every = [(name, module) for name, module in model.named_modules() if isinstance(module, RoutedBlock)]
    blocks = [(name, module) for name, module in every if not module.projection]
    if blocks and (paths := read_by_text(model)) is not None:
        blocks = [(name, module) for name, module in blocks if paths.has(f"{name}.")]
    places = module_paths_in(model) if blocks else None
    found = []
    for place, (name, block) in enumerate(blocks):
        layer = places.layer_of(f"{name}.") if places is not None else None
        found.append(RouterPlace(_number(name, place) if layer is None else layer, block, block.router, ()))
    of_parts = [part_name(model, name) for name, _ in blocks] if reads_images(model) else []
    if set(of_parts) - {"language"}:  # parts have layers of the same numbers
        pairs = zip(of_parts, found, strict=True)
        found = [replace(each, index=number, part=part) for number, (part, each) in enumerate(pairs)]
    return found


def _own_layers(places: list[RouterPlace]) -> list[MoeLayer]:
    """The same with their rules, which say themselves what they are; none if one is not read."""
    found = []
    for place in places:
        rule = cast(RoutedBlock, place.block).rule
        if not isinstance(rule, TopKRule) or isinstance(rule, SkipRule):
            varying = varying_rule(rule, place.count)
            if varying is None:
                return []
            found.append(MoeLayer(place.index, place.block, place.router, (), varying, part=place.part))
            continue
        # By ``ones`` every chosen expert weighs 1; softmax keeps the order of the logits, which is all that is left to say.
        equal = rule.equal_weight(place.count) if rule.scores == "ones" else None
        score: Score = "softmax" if rule.scores == "ones" else rule.scores
        read = RoutingRule(score, place.count, rule.top_k, rule.normalized, constant=equal)
        if isinstance(rule, StandardizedTopKRule):
            read = replace(read, spread=rule.spread)
        if isinstance(rule, TemperedRule):
            read = replace(read, temperature=rule.temperature)
        if isinstance(rule, BiasedTopKRule):
            router = place.router
            bias = partial(selection_bias, router, router)
            read = replace(read, factor=rule.factor, epsilon=rule.epsilon, bias=bias)
        found.append(MoeLayer(place.index, place.block, place.router, (), read, part=place.part))
    return found


def read_by_text(model: Any) -> ModulePaths | None:
    """Where a model of parts has its text model and head, the only parts that data of text train; ``None``: there are no others.

    Nor are there where the data have images, which all parts read.
    """
    if reads_images(model):
        return None
    return module_paths_of(model.config) if find("wrapper", base_type(model.config)) is not None else None


def _other_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of an architecture that is no target; none where a router's rule is not known.

    A model's answer is kept: once ZeRO-3 has divided its weights, routers cannot be asked any more.
    """
    answers = _answers()
    if own := _own_places(model):
        return _own_layers(own)
    if model not in answers:
        found: list[MoeLayer] = []
        for index, block in _blocks(model):
            read = next((pair for pair in map(partial(_asked, block), block.children()) if pair), None)
            if read is None:
                found = []
                break
            found.append(MoeLayer(index, block, read[0], _beside(model, index, block), read[1]))
        answers[model] = found
    return answers[model]


def _beside(model: nn.Module, index: int, block: nn.Module) -> tuple[nn.Module, ...]:
    """The blocks of a layer beside that of its experts, where the architecture is one whose experts can be read (Granite 4)."""
    if _model_type(model) not in MOES:
        return ()
    paths = module_paths_in(model)
    return tuple(one for one in paths.blocks_in(paths.layers_in(model)[index]) if one is not block)


@cache
def _answers() -> WeakKeyDictionary[nn.Module, list[MoeLayer]]:
    """What was read off the routers of every model that is still in memory."""
    return WeakKeyDictionary()


def _asked(block: nn.Module, router: nn.Module) -> tuple[nn.Module, RoutingRule] | None:
    """A module with the rule that explains what it gives for random inputs and weights, if it is a router of a known rule.

    Transformers' routers give logits ``[T, E]``, weights and experts ``[T, K]``. Every rule is tried on these logits, and must
    give the same weights of the same experts.
    """
    matrix = next((weight for weight in router.parameters() if weight.dim() == 2), None)
    top_k = getattr(router, "top_k", None)
    if matrix is None or not isinstance(top_k, int):
        return None
    experts = matrix.shape[0]
    draw = torch.Generator().manual_seed(0)
    copy = deepcopy(router).float().eval()
    # A plan has no weights, and a run that divides them has none yet: any will do.
    copy = copy.to_empty(device="cpu") if matrix.is_meta else copy.cpu()
    bias = torch.rand(experts, generator=draw) if bias_argument(router) else None
    with torch.no_grad():
        if matrix.is_meta:
            for value in (*copy.parameters(), *copy.buffers()):
                value.zero_()
        for weight in copy.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=draw))
        try:
            reads = getattr(router, "reads", matrix.shape[1])  # behind a hidden layer, the matrix reads another length
            tokens = torch.randn(_ASKED, reads, generator=draw)
            logits, weights, chosen = copy(tokens, bias) if bias is not None else copy(tokens)
        except (RuntimeError, TypeError, ValueError):  # no router, or one of another kind
            return None
    if logits.shape != (_ASKED, experts) or chosen.shape != (_ASKED, top_k):
        return None
    given = torch.zeros(_ASKED, experts).scatter(1, chosen, weights.float())
    for score in _SCORES:
        for normalized in (True, False):
            added = partial(selection_bias, copy, copy) if bias is None else lambda: bias
            rule = RoutingRule(score, experts, top_k, normalized, bias=added)
            own_weights, own = rule.route(logits)
            made = torch.zeros_like(given).scatter(1, own, own_weights)
            factor = float(f"{float(given.sum() / made.sum()):.4g}")
            if torch.allclose(given, factor * made, rtol=1e-3, atol=1e-6):
                return router, replace(rule, factor=factor, bias=partial(selection_bias, block, router))
    constant = RoutingRule("softmax", experts, top_k, constant=float(weights[0, 0]))
    largest = torch.equal(constant.route(logits)[1].sort(dim=1).values, chosen.sort(dim=1).values)
    return (router, constant) if largest and bool((weights == weights[0, 0]).all()) else None


def _model_type(model: Any) -> str:
    return str(text_config(model.config).model_type)


def _rule(target: Target, place: RouterPlace) -> RoutingRule:
    block, router = place.block, cast(Any, place.router)
    if getattr(router, "num_group", 1) != 1:
        raise UsageError(
            f"{target.name} router that chooses experts within {router.num_group} groups (n_group)",
            hint="set n_group and topk_group to 1 in config.json, as upcycle convert writes them",
        )
    if is_parallel(block):
        return RoutingRule(
            router.score_func, place.count, router.top_k, router.route_norm, router.route_scale,
            bias=lambda: selection_bias(block, router),
        )  # fmt: skip
    return RoutingRule(
        score=getattr(router, "expert_selection_fn", target.score),
        experts=place.count,
        top_k=router.top_k,
        normalized=getattr(router, "norm_topk_prob", True) or getattr(router, "expert_selection_fn", "") == "softmax",
        factor=getattr(router, "routed_scaling_factor", 1.0),
        epsilon=1e-6 if target.name == "lfm2_moe" else 0.0,
        constant=target.weight_of_chosen,
        bias=lambda: selection_bias(block, router),
    )
