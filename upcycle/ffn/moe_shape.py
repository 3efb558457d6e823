"""How large one MoE layer is, and the parts that its stored tensors consist of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from upcycle.ffn.form import FfnForm
from upcycle.ffn.router_network import LINEAR, RouterForm, Routes

PartKind = Literal[
    "gate",
    "up",
    "down",
    "gate_bias",
    "up_bias",
    "down_bias",
    "shifted_gate_up",  # of an expert that computes act(gate) * (up + 1): gate and up in turn, as columns
    "shifted_gate_up_bias",
    "shifted_down",  # transposed
    "gate_up",  # rows of gate and up alternating, as upcycle's kernels read them
    "gate_up_bias",
    "down_rows",  # the transpose of down
    "router",
    "router_hidden",
    "output_bias",  # the dense FFN's down bias, where it belongs to no expert
    "shared_gate",
    "shared_up",
    "shared_down",
    "shared_gate_bias",
    "shared_up_bias",
    "shared_down_bias",
    "shared_switch",  # the row whose sigmoid multiplies a shared expert, so small that it is 1/2
    "idle_gate",  # a shared expert that must exist but adds nothing: the first neurons, with a zero down projection
    "idle_up",
    "idle_down",
    "idle_gate_bias",
    "idle_up_bias",
    "idle_down_bias",
    "zeros",  # fp32: a bias on the choice of experts
    "filled",  # a number (``factor``) for each of ``size`` elements: a parameter that the dense model lacks, and that is off
]


@dataclass(frozen=True)
class Part:
    """A piece of a layer's :class:`~upcycle.ffn.expert_tensors.ExpertTensors`: a kind, its expert, a factor, a size where it is not
    the number of the expert's neurons.
    """

    kind: PartKind
    expert: int = 0
    factor: float = 1.0
    size: int = 0


@dataclass(frozen=True)
class MoeShape:
    """The numbers that fix every tensor shape of a converted model, the form of its experts, and how its router weighs."""

    experts: int
    top_k: int
    shared: int
    expert_size: int  # intermediate size of one expert
    moe_layers: tuple[int, ...]
    normalized: bool = True  # whether the chosen experts' weights sum to 1, or are what the softmax over all gives them
    form: FfnForm = field(default_factory=FfnForm)  # of the dense FFN, and so of every expert
    router: RouterForm = LINEAR
    rule: Routes | None = None  # of routing, where it is not top-k of a softmax (`normalized` or not)
    sizes: tuple[
        tuple[int, FfnForm], ...
    ] = ()  # of every layer, where layers differ; the fields above are the first one's

    def at(self, layer: int) -> MoeShape:
        """Return the numbers of one layer."""
        if not self.sizes:
            return self
        size, form = self.sizes[layer]
        return replace(self, expert_size=size, form=form, sizes=())

    @property
    def mean_active(self) -> float:
        """How many routed experts run for a token, in the mean; where nothing is known of that, as many as there are."""
        return self.top_k if self.rule is None else self.rule.mean_experts(self.experts)

    @property
    def runs_all(self) -> bool:
        """Whether every expert runs for every token, whatever the router's weights are."""
        if self.rule is None:
            return self.top_k == self.experts
        return self.rule.all_alike(self.experts, equal_logits=False)
