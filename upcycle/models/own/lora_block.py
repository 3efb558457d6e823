"""An FFN that stays, with experts of low rank beside it. T tokens, E experts, K slots, r rank, R rows of all experts, d."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from upcycle.errors import CheckpointError
from upcycle.models.own.adapted_ffn import AdaptedFfn
from upcycle.models.own.moe_block import RoutedBlock, TokenRouter

BEHIND_FFN = "output"  # the name of the experts behind an FFN


class LoraBlock(RoutedBlock):
    """Maps ``[..., d]`` to ``[..., d]``: the FFN that was here, and what a token's experts add, to its linear layers or to its output.

    With a universal expert, that one weighs ``1 - max G`` where G are the weights of the routed ones (MoCLE, arXiv 2312.12379).

    Args:
        ffn: its description.
        dense: the FFN.

    Attributes:
        dense: the FFN, whose weights keep their names.
        clusters: of every token of the present call the cluster of its instruction, ``[B, n]``; None: not known, and the universal
            expert has all tokens. See :func:`~upcycle.models.own.instructions.watch_instructions`.
    """

    def __init__(self, ffn: AdaptedFfn, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.router = ClusterRouter(ffn) if ffn.clusters else TokenRouter(ffn)
        self.experts = LoraExperts(ffn, dense)
        self.universal = ffn.universal
        self.clusters: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See the class."""
        gates = self.gates(hidden_states).to(hidden_states.dtype)
        out: torch.Tensor = self.experts(self.dense, hidden_states, gates)
        return out

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the weights of all experts for inputs ``[..., d]``: ``[T, E]``, or ``[T, E + 1]`` with the universal one last."""
        x, known = hidden_states.reshape(-1, hidden_states.shape[-1]), None
        if isinstance(self.router, ClusterRouter):
            clusters = self.clusters
            if clusters is None or clusters.shape != hidden_states.shape[:-1]:
                clusters = torch.full(hidden_states.shape[:-1], -1, device=x.device)
            clusters = clusters.reshape(-1).to(x.device)
            x, known = self.router.embedded(clusters.clamp(min=0)), clusters >= 0
        logits, weights, ids = self.router(x)
        every = logits.new_zeros(len(logits), self.experts.count + 1)  # the last is for what is no expert
        found: torch.Tensor = every.scatter(1, ids, weights.to(every.dtype))[:, :-1]
        if known is not None:
            found = found * known[:, None]
        if self.universal:
            found = torch.cat([found, 1 - found.amax(1, keepdim=True)], 1)
        return found


class ClusterRouter(TokenRouter):
    """A router that reads a learned vector of the cluster that a token's instruction is in.

    Attributes:
        clusters: these vectors, one per row.
    """

    def __init__(self, ffn: AdaptedFfn) -> None:
        super().__init__(_OfClusters(ffn))
        self.clusters = nn.Parameter(torch.empty(ffn.clusters, ffn.embedding))
        nn.init.normal_(self.clusters)

    def embedded(self, clusters: torch.Tensor) -> torch.Tensor:
        """Return the vectors ``[T, embedding]`` of clusters ``[T]``."""
        return functional.embedding(clusters, self.clusters)


class _OfClusters:
    """What a router needs to know of a block, with inputs as long as the embeddings of clusters."""

    def __init__(self, ffn: AdaptedFfn) -> None:
        self.experts, self.hidden_size, self.router = ffn.experts, ffn.embedding, ffn.router
        self.router_bias, self.rule = ffn.router_bias, ffn.rule


class LoraExperts(nn.Module):
    """All experts of a block: at every place a pair of matrices for each.

    Attributes:
        count: E, the routed ones.
        pairs: by the linear layer that they stand beside (dots as underscores), or ``output``.
    """

    def __init__(self, ffn: AdaptedFfn, dense: nn.Module) -> None:
        super().__init__()
        self.count, self.linears = ffn.experts, ffn.linears
        self.pairs = nn.ModuleDict()
        if not ffn.linears:
            self.pairs[BEHIND_FFN] = LoraPair(ffn, ffn.hidden_size, ffn.hidden_size)
        for path in ffn.linears:
            self.pairs[_key(path)] = LoraPair(ffn, *linear_sizes(_linear(dense, path)))

    def forward(self, dense: nn.Module, hidden_states: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Return the FFN's output ``[..., d]`` with what its experts add, by their weights ``[T, E]``."""
        pairs = {key: self._pair(key) for key in self.pairs}
        for path in self.linears:
            _hook(dense.get_submodule(path), pairs[_key(path)])
        for pair in pairs.values():
            pair.gates = gates
        out: torch.Tensor = dense(hidden_states)
        if BEHIND_FFN in pairs:
            out = pairs[BEHIND_FFN].beside(dense, (out,), out)
        for pair in pairs.values():
            pair.gates = None
        return out

    def _pair(self, key: str) -> LoraPair:
        found = self.pairs[key]
        assert isinstance(found, LoraPair)
        return found


class LoraPair(nn.Module):
    """The thin matrices of all experts at one place: expert e adds ``scale B_e A_e x``, an adapter ``scale B_e act(A_e x)``.

    All experts are computed for every token, and weighed, in two products: together they are thinner than an FFN.

    Attributes:
        a: ``[R, in]``, r rows for each expert.
        b: ``[R, out]``, likewise: the transpose of what papers call B. Zeros at first, so that experts begin by adding nothing.
        gates: ``[T, E]``, the weights in the present call; None: outside one, nothing is added.
    """

    def __init__(self, ffn: AdaptedFfn, reads: int, writes: int) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        rows = ffn.copies * ffn.rank
        self.rank, self.scale = ffn.rank, ffn.scale
        self.act = ACT2FN[ffn.activation] if ffn.activation else None
        self.a, self.b = nn.Parameter(torch.empty(rows, reads)), nn.Parameter(torch.zeros(rows, writes))
        nn.init.uniform_(self.a, -1 / math.sqrt(reads), 1 / math.sqrt(reads))
        self.gates: torch.Tensor | None = None

    def beside(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Return a module's output with what the experts make of its input; a forward hook."""
        if self.gates is None:
            return output
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        inner = functional.linear(x, self.a)
        inner = inner if self.act is None else self.act(inner)
        weighed = inner * self.gates.repeat_interleave(self.rank, dim=1)
        return output + (self.scale * (weighed @ self.b)).view(output.shape)


def _key(path: str) -> str:
    return path.replace(".", "_")


def _hook(linear: nn.Module, pair: LoraPair) -> None:
    """Let a pair add to what a linear layer puts out, if it does not yet: quantisation, for one, puts another layer in its place.

    What stands around the layer (an adapter of peft) does not count. The hook is a bound method, so that a copy of the model has
    the copied pair's.
    """
    if not any(hook == pair.beside for part in linear.modules() for hook in part._forward_hooks.values()):
        linear.register_forward_hook(pair.beside)


def _linear(dense: nn.Module, path: str) -> nn.Module:
    try:
        found = dense.get_submodule(path)
        linear_sizes(found)
    except (AttributeError, ValueError):
        raise CheckpointError(
            f"config.json: 'adapted_ffns' names the linear layer '{path}', which a {type(dense).__name__} does not have",
            hint=f"its linear layers: {', '.join(linears_inside(dense)) or 'none'}",
        ) from None
    return found


def linears_inside(dense: nn.Module) -> list[str]:
    """Return the names of the linear layers inside an FFN."""
    return [name for name, module in dense.named_modules() if name and _is_linear(module)]


def linear_sizes(linear: nn.Module) -> tuple[int, int]:
    """Return the lengths of input and output of a linear layer (or GPT-2's ``Conv1D``).

    Raises:
        ValueError: it is none.
    """
    if not _is_linear(linear):
        raise ValueError(type(linear).__name__)
    weight: Any = linear.weight
    first, second = map(int, weight.shape)
    return (second, first) if isinstance(linear, nn.Linear) else (first, second)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
