"""The list of routing rules."""

from __future__ import annotations

from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule
from upcycle.models.own.routing.causal_choice import CausalChoiceRule
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.models.own.routing.expert_choice import ExpertChoiceRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.skip import SkipRule
from upcycle.models.own.routing.standardized import StandardizedTopKRule
from upcycle.models.own.routing.tempered import TemperedRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.models.own.routing.top_k import TopKRule

RULES: dict[str, type[RouterRule]] = {
    rule.name: rule
    for rule in (
        TopKRule,
        TemperedRule,
        DynamicKRule,
        ThresholdRule,
        ReluRule,
        ExpertChoiceRule,
        CausalChoiceRule,
        BiasedTopKRule,
        SkipRule,
        StandardizedTopKRule,
    )
}
