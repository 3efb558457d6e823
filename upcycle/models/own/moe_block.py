"""The module that stands where an FFN was: a router, routed experts, a shared expert. T tokens, E experts, K slots, d, N neurons.

A block that leads from one stream to another puts out d' numbers where d is said of outputs and of rows of ``down``.

Routed experts are packed as upcycle's kernels read them without a copy (:mod:`upcycle.kernels.layout.expert_weights`): experts are
ranges of rows of ``up`` and ``down``, both with d numbers per row, so that widths may differ; with a gate, its rows alternate
with those of up.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from upcycle.ffn.router_network import RouterForm
from upcycle.kernels.entry.transformers_experts import foreign_weights, module_output
from upcycle.kernels.layout.expert_weights import WeightLayout, WeightTensors
from upcycle.models.own.factored_experts import FactoredExperts
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule
from upcycle.models.own.routing.causal_choice import CausalChoiceRule, ChoiceCorrection
from upcycle.models.own.routing.skip import SkipRule

IMPLEMENTATIONS = ("upcycle", "eager")
DOWN_WEIGHTS = ("experts.down", "shared_down")  # which may be fp32 where the others are fp16
_SPREAD = 0.02  # of new weights
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh")
# transformers' name -> the kernels' name of the same function
KERNEL_ACTIVATIONS = {
    **dict.fromkeys(_TANH_GELU, "gelu_pytorch_tanh"),
    **{"gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu"},
}


class RoutedFfn(Protocol):
    """What a router needs to know of its block."""

    @property
    def experts(self) -> int:
        """How many there are."""

    @property
    def hidden_size(self) -> int:
        """The length of the router's inputs."""

    @property
    def router(self) -> RouterForm:
        """Whether it has a hidden layer."""

    @property
    def router_bias(self) -> bool:
        """Whether it adds a bias to its logits."""

    @property
    def rule(self) -> RouterRule:
        """What makes weights and ids of the logits."""


class RoutedBlock(nn.Module):
    """A module with experts behind a router, whatever these are: all that training and reports ask for.

    Attributes:
        router: see :class:`TokenRouter`.
        experts: a module; its ``count`` is how many there are.
        projection: whether it stands where attention had a projection, and not where an FFN was.
    """

    router: TokenRouter
    experts: Any
    projection = False

    @property
    def rule(self) -> RouterRule:
        """What the router's logits mean."""
        return self.router.rule


class MoeBlock(RoutedBlock):
    """Maps ``[..., d]`` to ``[..., d]``, like the FFN that was here. Further arguments of a call are ignored.

    Args:
        ffn: its description.

    Attributes:
        projection: whether it stands where attention had a projection, and not where an FFN was.
        mask: of the tokens of the present call, 0 at padding, where the rule looks at whole sequences and the model was given one:
            see :func:`~upcycle.models.own.token_mask.watch_masks`.
        received: ``[B, n]``, the attention that tokens of the present call get, where the rule protects some: see
            :func:`~upcycle.models.own.attention_received.watch_attention`.
    """

    def __init__(self, ffn: ReplacedFfn) -> None:
        super().__init__()
        d, out, shared = ffn.hidden_size, ffn.output, ffn.shared_width
        self.router = TokenRouter(ffn)
        self.experts = FactoredExperts(ffn) if ffn.ranks else PackedExperts(ffn)
        # An adapter may stand around the experts, and hide it. In a tuple, as its weights are the experts' alone.
        self._act = (self.experts.act,)
        if shared:
            self.shared_gate = nn.Linear(d, shared, bias="gate" in ffn.biases) if ffn.gated else None
            self.shared_up = nn.Linear(d, shared, bias="up" in ffn.biases)
            self.shared_down = nn.Linear(shared, out, bias="down" in ffn.biases)
            self.shared_switch = nn.Linear(d, 1, bias=False) if ffn.shared_switch else None
        self.projection = ffn.projection
        self.has_shared, self.shared_width = bool(shared), shared
        self.output_bias = nn.Parameter(torch.zeros(out)) if "output" in ffn.biases else None
        self.dropout = nn.Dropout(ffn.dropout)
        self.mask: torch.Tensor | None = None
        self.received: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See the class."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        # A batch of sequences (or images), or tokens of one.
        length = hidden_states.shape[1:-1].numel() if hidden_states.ndim > 2 else len(x)
        _, weights, ids = self.router(x, length, self._real(hidden_states), self._protected(hidden_states))
        return self._whole(x, self.experts(x, ids, weights)).view(*hidden_states.shape[:-1], -1)

    def _real(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return ``[T]``, 0 at padding; None where nothing is known of it."""
        if self.mask is None or self.mask.shape != hidden_states.shape[:-1]:
            return None
        return self.mask.reshape(-1).to(hidden_states.device)

    def _protected(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return which tokens keep all their experts, boolean ``[T]``; None: none does."""
        if self.received is None or not isinstance(self.rule, SkipRule):
            return None
        attention, self.received = self.received.to(hidden_states.device), None  # of this call alone
        if attention.shape != hidden_states.shape[:-1]:
            return None
        return self.rule.important(attention * hidden_states.detach().abs().sum(-1, dtype=torch.float32)).flatten()

    def everyone(self, x: torch.Tensor, weight: float) -> torch.Tensor:
        """Return ``[..., d]`` with every expert's neurons active at one weight, whatever the router says.

        Down biases, which are not scaled as neurons are, are added as by weights that sum to 1.
        """
        flat = x.reshape(-1, x.shape[-1])
        count = self.experts.count
        ids = torch.arange(count, device=x.device).expand(len(flat), count)
        routed = self.experts(flat, ids, torch.full(ids.shape, weight, dtype=x.dtype, device=x.device))
        if self.experts.down_bias is not None:
            routed = routed + self.experts.down_bias.sum(0) * (1 / count - weight)
        return self._whole(flat, routed).view(*x.shape[:-1], -1)

    def _whole(self, x: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """Add to the routed experts' output what does not depend on the router."""
        if self.has_shared:
            act, up = self._act[0], self.shared_up(x)
            hidden = act(up) if self.shared_gate is None else act(self.shared_gate(x)) * up
            made = self.shared_down(hidden.to(self.shared_down.weight.dtype))
            routed = routed + (made if self.shared_switch is None else self.shared_switch(x).sigmoid() * made)
        if self.output_bias is not None:
            routed = routed + self.output_bias
        out: torch.Tensor = self.dropout(routed)
        return out


class TokenRouter(nn.Module):
    """Returns logits ``[T, E]``, weights ``[T, K]`` and ids of experts ``[T, K]``, as the routers of stock MoE classes do.

    With a hidden layer, ``hidden.weight`` is ``[H, d]`` and ``weight`` ``[E, H]``; see
    :class:`~upcycle.ffn.router_network.RouterForm`.

    It is no ``nn.Linear``, as theirs are none: what adds adapters to every linear layer would take its three outputs for one.

    Attributes:
        weight: ``[E, d]``.
        bias: ``[E]``, if the router has one.
        e_score_correction_bias: ``[E]``, what is added to the scores for the choice alone, if the rule has that; a buffer, as in
            stock classes.
        choice: what predicts which experts choose a token, if the rule has that.
        rule: what makes weights and ids of the logits.
        form: whether there is a hidden layer.
        reads: d, the length of inputs.
        top_k: experts per token, where that is a fixed number.
    """

    def __init__(self, ffn: RoutedFfn) -> None:
        form = ffn.router
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ffn.experts, ffn.hidden_size if form.linear else form.width))
        self.bias = nn.Parameter(torch.zeros(ffn.experts)) if ffn.router_bias else None
        biased = isinstance(ffn.rule, BiasedTopKRule) and ffn.rule.biased
        self.e_score_correction_bias = nn.Buffer(torch.zeros(ffn.experts)) if biased else None
        self.choice = ChoiceCorrection(ffn.experts, ffn.hidden_size) if ffn.rule.predicts_choice else None
        nn.init.normal_(self.weight, std=_SPREAD)
        self.hidden = None if form.linear else nn.Linear(ffn.hidden_size, form.width, bias=False)
        self.rule, self.form, self.reads = ffn.rule, form, ffn.hidden_size
        self.top_k: int | None = getattr(ffn.rule, "top_k", None)

    def forward(
        self,
        x: torch.Tensor,
        length: int | None = None,
        real: torch.Tensor | None = None,
        protected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See the class; ``x`` is ``[T, d]``, of sequences of ``length`` tokens, of which padding is 0 in ``real`` ``[T]``.

        Tokens that are ``protected`` ``[T]`` keep all their experts under a rule that leaves some out.
        """
        correction = None if self.choice is None else self.choice(x)
        x = self.form.before(x)
        if self.hidden is not None:
            x = self.form.activated(self.hidden(x))
        logits = self.form.behind(functional.linear(x, self.weight, self.bias))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if isinstance(self.rule, SkipRule):
            ids, weights = self.rule.route(logits, self.e_score_correction_bias, protected)
        elif isinstance(self.rule, BiasedTopKRule):
            ids, weights = self.rule.route(logits, self.e_score_correction_bias)
        elif isinstance(self.rule, CausalChoiceRule):
            ids, weights = self.rule.route(logits, correction)
        else:
            ids, weights = self.rule.route_sequences(logits, length or len(logits), real)
        return logits, weights, ids


class PackedExperts(nn.Module):
    """The routed experts.

    Attributes:
        up: ``[N, d]``; with a gate ``gate_up`` ``[2 N, d]``, gate and up rows alternating.
        down: ``[N, d]``: row j is what neuron j adds to the output.
        up_bias: ``[N]`` or ``[2 N]``, in the order of the rows. Where only one of gate and up has a bias, the other's is 0.
        down_bias: ``[E, d]``.
        implementation: ``upcycle``: on the kernels, where they have the activation; ``eager``: one expert after another.
    """

    def __init__(self, ffn: ReplacedFfn) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        d, out, neurons = ffn.hidden_size, ffn.output, sum(ffn.widths)
        rows = neurons * (2 if ffn.gated else 1)
        self.count, self.widths, self.gated = ffn.experts, ffn.widths, ffn.gated
        self.act = ACT2FN[ffn.activation].to(torch.get_default_dtype())  # weights that it has are bfloat16 otherwise
        self.kernel_activation = KERNEL_ACTIVATIONS.get(ffn.activation)
        self.implementation = IMPLEMENTATIONS[0]
        self.register_parameter("gate_up" if ffn.gated else "up", nn.Parameter(torch.empty(rows, d)))
        self.down = nn.Parameter(torch.empty(neurons, out))
        has_bias = bool(ffn.biases & {"gate", "up"})
        self.up_bias = nn.Parameter(torch.zeros(rows)) if has_bias else None
        self.down_bias = nn.Parameter(torch.zeros(self.count, out)) if "down" in ffn.biases else None
        for weight in (self._up, self.down):
            nn.init.normal_(weight, std=_SPREAD)

    @property
    def _up(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self, "gate_up" if self.gated else "up")
        return found

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return ``[T, d]``: the experts ``ids`` ``[T, K]`` of every row of ``x``, times ``weights`` ``[T, K]``; id E is no expert."""
        tensors = WeightTensors(self._up, self.down, self.up_bias, self.down_bias)
        # Kernels know one length of rows, and one dtype.
        mixed = self.down.dtype != self._up.dtype or self.down.shape[1] != self._up.shape[1]
        kernel = self.kernel_activation if self.implementation == "upcycle" and not mixed else None
        if kernel is not None and foreign_weights(*tensors) is None:
            layout = WeightLayout(kernel, self.gated, self.gated, False, self.widths)
            return module_output(self, x.to(self.down.dtype), tensors, layout, ids, weights).to(x.dtype)
        if torch.compiler.is_compiling():
            return self._masked(x, ids, weights)
        return self._one_by_one(x, ids, weights)

    def active(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Return the activations ``[t, n]`` of the neurons of one expert for inputs ``[t, d]``, without gradients."""
        first, per_neuron = sum(self.widths[:expert]), 2 if self.gated else 1
        with torch.no_grad():
            return self._hidden(x, slice(per_neuron * first, per_neuron * (first + self.widths[expert])))

    def _hidden(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the activations ``[t, n]`` of the neurons of some rows of ``up``."""
        bias = None if self.up_bias is None else self.up_bias[rows]
        z = functional.linear(x, self._up[rows], bias)
        hidden: torch.Tensor = self.act(z[..., ::2]) * z[..., 1::2] if self.gated else self.act(z)
        return hidden.to(self.down.dtype) if self.down.dtype != self._up.dtype else hidden

    def _one_by_one(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype if self.down.dtype == self._up.dtype else self.down.dtype
        out = torch.zeros(len(x), self.down.shape[1], dtype=dtype, device=x.device)
        first, per_neuron = 0, 2 if self.gated else 1
        for expert, width in enumerate(self.widths):
            tokens, slots = torch.where(ids == expert)
            last = first + width
            if len(tokens):
                hidden = self._hidden(x[tokens], slice(per_neuron * first, per_neuron * last))
                made = hidden @ self.down[first:last]
                if self.down_bias is not None:
                    made = made + self.down_bias[expert]
                out = out.index_add(0, tokens, (made * weights[tokens, slots, None]).to(out.dtype))
            first = last
        return out

    def _masked(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute every expert, and weigh those by 0 that a token does not have: the shapes do not depend on the router."""
        every = torch.zeros(len(x), self.count + 1, dtype=weights.dtype, device=x.device)
        every = every.scatter_add(1, ids, weights)[:, : self.count].to(x.dtype)
        lengths = torch.tensor(self.widths, device=x.device)
        per_neuron = every.repeat_interleave(lengths, dim=1, output_size=sum(self.widths))
        out = (self._hidden(x, slice(None)) * per_neuron) @ self.down
        return out if self.down_bias is None else out + every @ self.down_bias
