"""Solar Open: Llama's attention (biases on q, k and v by flag), sigmoid routing, a shared expert, no dense layers."""

from __future__ import annotations

from upcycle.architectures.dense.base import Feature
from upcycle.architectures.moe.sigmoid.base import SigmoidTarget


class SolarOpen(SigmoidTarget):
    """Has a MoE in every layer, and a window in none."""

    name = "solar_open"
    title = "Solar Open"
    architecture = "SolarOpenForCausalLM"
    holds = frozenset({Feature.PLAIN_QUERIES, Feature.QKV_BIAS, Feature.SHARED_EXPERTS})
