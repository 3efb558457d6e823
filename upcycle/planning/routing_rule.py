"""The routing rule that a recipe names, what it can be combined with, and why a layer under it is not the dense FFN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.moe.base import Target
from upcycle.architectures.stock_auto import is_encoder, is_encoder_decoder
from upcycle.errors import RefusalError, UsageError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.ffn.router_network import RouterForm
from upcycle.methods.base import Method, Scale
from upcycle.recipe.conversion_recipe import Recipe, RefitKind
from upcycle.routers.base import Router

_USUAL = {"scores": "softmax", "normalized": True}  # top-k of a softmax is what targets do unless told otherwise


def check_counts(recipe: Recipe) -> None:
    """Refuse a recipe that says how many experts run, where its rule finds that for every token.

    Raises:
        UsageError: see above.
    """
    rule = recipe.routing.rule
    if rule == "top_k":
        return
    where = f"the rule {rule} finds for every token how many experts run"
    if recipe.active is not None:
        raise UsageError(f"'active' says how much runs, and {where}", hint="--experts and --shared, without --active")
    if "top_k" in recipe.model_fields_set and recipe.top_k != recipe.experts:
        raise UsageError(f"top_k is {recipe.top_k}, and {where}", hint="leave --top-k out, or --routing top_k")


def with_all_experts(recipe: Recipe) -> Recipe:
    """Return the recipe, with as many experts per token as there are where its rule lets all of them run."""
    return recipe if recipe.routing.rule == "top_k" else recipe.model_copy(update={"top_k": recipe.experts})


def rule_of(recipe: Recipe, method: Method) -> Any | None:
    """Return the rule (:class:`~upcycle.models.own.routing.base.RouterRule`); None for top-k of a softmax as the method has it.

    Raises:
        UsageError: the method sets what the rule is asked for, too.
    """
    routing = recipe.routing
    if routing.rule == "top_k" and {**_USUAL, **routing.parameters} == _USUAL:
        return None
    if not method.normalized:
        raise UsageError(
            f"gate=softmax of {method.name} is a routing rule, too",
            hint="leave it out: routing says what experts weigh",
        )
    from upcycle.models.own.routing.rules import RULES

    top_k = {"top_k": recipe.top_k} if routing.rule == "top_k" else {}
    name = "standardized_top_k" if routing.spread is not None else routing.rule
    return RULES[name].of({**top_k, **routing.parameters})


def refuse_unroutable(target: Target, shape: MoeShape, router: Router | None = None) -> None:
    """Refuse a rule, or a router with a hidden layer, that a stock class does not have.

    Raises:
        RefusalError: the message says what the target's router does.
    """
    if target.holds_rules:
        return
    hint = "--target upcycle_moe, which holds any dense model"
    rule: Any = shape.rule
    if rule is not None:
        raise RefusalError(
            f"{target.name} routes by {target.router_semantics}: it has no rule by which the experts that run are {rule.says}"
            + (f" and weigh {rule.scores}" if rule.name in ("top_k", "standardized_top_k") else ""),
            hint=hint,
        )
    if router is not None and not shape.router.linear:
        raise RefusalError(
            f"{target.name} has linear routers, and the {router.name} router has a hidden layer of {shape.router.width}",
            hint=hint,
        )


def check_rule(target: Target, shape: MoeShape, router: Router, members: int) -> None:
    """Refuse a rule that cannot read this router's logits, or that makes a down bias count other than once.

    Raises:
        UsageError: see above.
        RefusalError: as :func:`refuse_unroutable`.
    """
    refuse_unroutable(target, shape, router)
    rule: Any = shape.rule
    if rule is None:
        return
    if problem := rule.check(shape.experts):
        raise UsageError(f"routing: {problem}")
    sparse = not rule.all_alike(shape.experts, router.equal_weights)
    if rule.compares_norms and sparse and not router.predicts_norms:
        raise UsageError(
            f"the rule {rule.name} compares predicted norms of the experts' outputs, and the {router.name} router predicts none",
            hint="--router d2d_norms with a calibration text; or tau 0, which runs every expert",
        )
    if members and "down" in shape.form.biases and not rule.sums_to_one(shape.experts):
        raise UsageError(
            f"by the rule {rule.name} weights do not sum to 1, and each source's FFN has a down bias, which must count once",
            hint="--routing top_k",
        )


def check_causal(recipe: Recipe, dense: DenseConfig, shape: MoeShape) -> None:
    """Refuse a rule that looks at later tokens in a layer of a model that writes one token after another.

    Raises:
        UsageError: see above.
    """
    rule: Any = shape.rule
    if rule is None or rule.per_token or is_encoder(dense.raw):
        return
    both = is_encoder_decoder(dense.raw)
    if both and recipe.parts == ("encoder",):
        return
    raise UsageError(
        f"by the rule {rule.name} the experts of a token depend on the tokens behind it, and "
        + ("a decoder does not know them" if both else "a causal model does not know them")
        + ": it would write by another routing than it reads",
        hint="part: encoder, which converts the encoder alone"
        if both
        else "--routing causal_choice, whose routers learn beside expert choice to do without later tokens, or --routing top_k",
    )


def router_form(router: Router, shape: MoeShape) -> RouterForm:
    """Return the form of a router, with the bias that the rule needs."""
    rule: Any = shape.rule
    return replace(router.form(shape.experts), bias=None if rule is None else rule.router_bias)


def scale_by(method: Method, convention: Scale, shape: MoeShape) -> float:
    """Return the scale of the routed experts by a convention of the method.

    A method's are for weights that sum to 1; where those of a rule do not, it is divided by what they are.
    """
    factor = method.scale(convention, shape.experts, shape.top_k, shape.shared)
    rule = shape.rule
    return factor if rule is None else factor / shape.top_k / rule.equal_weight(shape.experts)


def check_refit(recipe: Recipe, refit: RefitKind, scale: float, shape: MoeShape) -> None:
    """Refuse a refit of a layer that is not the plain sum of its experts, or that training could not run.

    Raises:
        UsageError: see above.
    """
    plain = plain_scale(shape)
    rule: Any = shape.rule
    if refit != "none" and rule is not None and not rule.per_token:
        raise UsageError(
            f"a refit fits tokens one by one, and by the rule {rule.name} they compete within their sequence",
            hint="--refit none",
        )
    if refit in ("down", "blocks") and scale != plain:
        raise UsageError(
            f"a refit fits the plain sum of the chosen experts: scale {plain:g}, not {scale:g} (--scale {recipe.scale})",
            hint="leave --scale out, or use --refit none",
        )
    if refit == "blocks" and (shape.rule is not None or not shape.router.linear):
        raise UsageError(
            "refit blocks trains a layer behind a linear router that chooses a fixed number of experts",
            hint="--refit down, or --routing top_k with another router",
        )


def plain_scale(shape: MoeShape) -> float:
    """Return the scale at which the layer is the plain sum of the experts that run."""
    return float(shape.top_k) if shape.rule is None else 1 / shape.rule.equal_weight(shape.experts)


def routing_facts(shape: MoeShape) -> dict[str, Any]:
    """Return the rule as plain data: its name, its parameters, its paper, and which experts run in words; empty without experts."""
    from upcycle.models.own.routing.top_k import TopKRule

    if not shape.experts:
        return {}
    rule: Any = shape.rule or TopKRule(shape.top_k, normalized=shape.normalized)
    return {"rule": rule.name, **vars(rule), "paper": rule.paper, "says": rule.says}


def why_unequal(method: Method, shape: MoeShape, scale: float, router: Router, target: Target) -> str | None:
    """Return why a layer differs from the dense FFN beyond rounding, in words; None: it does not.

    Args:
        method: what chose the experts' neurons.
        shape: the numbers of the layer, with its router's form and rule.
        scale: the factor on the routed experts.
        router: what made the router.
        target: the architecture that is written.
    """
    if reason := method.inexact(shape, scale):
        return reason
    rule: Any = shape.rule
    sums_to_one = rule is None or rule.sums_to_one(shape.experts)
    if rule is None:
        every = shape.top_k == shape.experts
        alike = bool(router.equal_weights or target.weight_of_chosen)
    else:
        every = alike = rule.all_alike(shape.experts, router.equal_weights)
    any_router = method.exact_with_any_router and sums_to_one
    exact = scale_by(method, "exact", shape)
    if scale != exact and (every or any_router):
        return f"the routed experts are scaled by {scale:g}, equality needs {exact:g}"
    if any_router or (every and alike):
        return None
    if not every:
        some = f"{shape.top_k} of {shape.experts} experts run per token"
        return some if rule is None else f"the experts that run are {rule.says}"
    return f"the {router.name} router does not weigh all experts equally"
