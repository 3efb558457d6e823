"""Why a layer of experts is not the dense FFN, told before a weight is read."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.moe.base import Target
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Method
from upcycle.planning.routing_rule import scale_by
from upcycle.routers.base import Router


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
