"""Small layers of every shape that has broken a kernel somewhere, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_oracle import Answer, Problem

from upcycle.kernels.layout.dispatch import Dispatch, route
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients, pack


def top_k(tokens: int, experts: int, k: int, rng: torch.Generator) -> list[list[int]]:
    return torch.rand(tokens, experts, generator=rng).argsort(1)[:, :k].tolist()


def among(*allowed: int) -> Callable[[int, int, int, torch.Generator], list[list[int]]]:
    """A choice of only these experts; the others have no token."""

    def choose(tokens: int, experts: int, k: int, rng: torch.Generator) -> list[list[int]]:
        return [[allowed[place] for place in row] for row in top_k(tokens, len(allowed), k, rng)]

    return choose


def some_dropped(tokens: int, experts: int, k: int, rng: torch.Generator) -> list[list[int]]:
    """Expert ids by token, of which a third and all of token 0 belong to another rank."""
    chosen = top_k(tokens, experts, k, rng)
    drop = torch.rand(tokens, k, generator=rng) < 1 / 3
    return [[experts if t == 0 or drop[t, s] else chosen[t][s] for s in range(k)] for t in range(tokens)]


def varying(tokens: int, experts: int, k: int, rng: torch.Generator) -> list[list[int]]:
    """Expert ids by token, 0 to k of them, none for the first and the last token."""
    numbers = torch.randint(0, k + 1, (tokens,), generator=rng).tolist()
    numbers[0] = numbers[-1] = 0
    return [row[:number] for row, number in zip(top_k(tokens, experts, k, rng), numbers, strict=True)]


@dataclass(frozen=True)
class Case:
    """A layer's shape and layout, and how its tokens choose experts."""

    tokens: int = 20
    hidden: int = 32
    widths: tuple[int, ...] = (32,) * 4
    k: int = 2
    choose: Callable[[int, int, int, torch.Generator], list[list[int]]] = field(default=top_k)
    layout: str = "packed"
    activation: str = "silu"
    gated: bool = True
    weighted: bool = True
    dtype: torch.dtype = torch.float32
    biases: bool = False


CASES = {
    "several tiles": Case(),
    "one token": Case(tokens=1),
    "one expert per token": Case(k=1),
    "all experts": Case(tokens=9, k=4),
    "one expert": Case(tokens=9, widths=(32,), k=1),
    "idle experts": Case(widths=(32,) * 6, choose=among(1, 4)),
    "all to one": Case(tokens=37, k=1, choose=among(2)),
    "primes": Case(tokens=13, hidden=37, widths=(29,) * 5, k=3),
    "dropped slots": Case(choose=some_dropped),
    "everything dropped": Case(tokens=3, choose=lambda tokens, experts, k, _: [[experts] * k] * tokens),
    "varying numbers": Case(k=3, choose=varying),
    "ragged widths": Case(tokens=9, widths=(64, 128, 192), k=2),
    "ragged, varying, primes": Case(tokens=11, hidden=23, widths=(7, 33, 16, 50), k=3, choose=varying),
    "unweighted": Case(tokens=9, weighted=False),
    "unweighted, varying": Case(tokens=9, weighted=False, choose=varying),
    "stacked": Case(layout="stacked"),
    "stacked, primes": Case(tokens=13, hidden=37, widths=(29,) * 3, layout="stacked"),
    "stacked, transposed": Case(tokens=9, layout="transposed"),
    "stacked, interleaved": Case(tokens=9, layout="interleaved"),
    "stacked, interleaved, transposed": Case(tokens=9, layout="interleaved transposed"),
    "plain relu": Case(tokens=9, gated=False, activation="relu"),
    "plain gelu, stacked": Case(tokens=9, gated=False, activation="gelu", layout="stacked"),
    "plain relu2, ragged": Case(tokens=9, gated=False, activation="relu2", widths=(16, 48, 33)),
    "geglu": Case(tokens=9, activation="gelu"),
    "geglu tanh": Case(tokens=9, activation="gelu_pytorch_tanh", layout="stacked"),
    "biases": Case(tokens=9, biases=True),
    "biases, stacked": Case(tokens=9, biases=True, layout="stacked", hidden=37, choose=some_dropped),
    "biases, plain": Case(tokens=9, biases=True, gated=False, weighted=False),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16 stacked": Case(tokens=9, dtype=torch.bfloat16, layout="stacked"),
    "bf16 ragged": Case(tokens=9, widths=(16, 48, 33), dtype=torch.bfloat16),
    "fp16": Case(tokens=9, dtype=torch.float16),
}
# One case for every mechanism, for `make test`.
QUICK = (
    "one token",
    "dropped slots",
    "ragged, varying, primes",
    "stacked, primes",
    "plain relu",
    "biases, stacked",
    "bf16",
)


@dataclass
class Made:
    """A case filled with numbers, for the oracle and for the kernels."""

    problem: Problem
    weights: ExpertWeights
    dispatch: Dispatch
    arguments: tuple[Any, ...]
    """x, weights, dispatch, scores."""

    def gradients(self) -> Gradients:
        """All gradients that there can be."""
        x, weights, _, scores = self.arguments
        return Gradients(x, weights.up, weights.down, weights.up_bias, weights.down_bias, scores)

    def pairs(
        self, output: torch.Tensor, found: Gradients, exact: Answer
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of what the kernels found and what is exact, by name; a weight's gradients of all experts are one vector."""
        assert found.x is not None
        pairs = {"output": (output, exact.output), "x": (found.x, exact.x)}
        experts = range(self.weights.num_experts)

        def flat(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([part.flatten() for part in parts])

        for which in ("gate", "up") if self.weights.gated else ("up",):
            assert found.up is not None
            mine = [self.weights.pick(found.up, expert, which) for expert in experts]  # type: ignore[arg-type]
            pairs[which] = flat(mine), flat(getattr(exact, which))
        pairs["down"] = flat([self.weights.down_of(expert, found.down) for expert in experts]), flat(exact.down)
        for name, wanted in exact.biases.items():
            if name == "down":
                assert found.down_bias is not None
                pairs["down bias"] = found.down_bias.flatten(), flat(wanted)
            else:
                rows = [self.weights.up_bias_of(expert, found.up_bias) for expert in experts]
                mine = [self.weights.half(part, name) for part in rows]  # type: ignore[arg-type]
                pairs[f"{name} bias"] = flat(mine), flat(wanted)
        if exact.scores is not None:
            assert found.scores is not None
            pairs["scores"] = found.scores, exact.scores
        return pairs


def make(case: Case, device: torch.device, seed: int = 0) -> Made:
    """A case filled with random numbers, the same on every device."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(case.dtype).to(device)

    experts, hidden = len(case.widths), case.hidden
    x, grad = draw(case.tokens, hidden), draw(case.tokens, hidden)
    gate = [draw(width, hidden, scale=hidden**-0.5) for width in case.widths] if case.gated else None
    up = [draw(width, hidden, scale=hidden**-0.5) for width in case.widths]
    down = [draw(hidden, width, scale=width**-0.5) for width in case.widths]
    names = ("gate", "up", "down") if case.gated else ("up", "down")
    sizes = {"gate": case.widths, "up": case.widths, "down": (hidden,) * experts}
    biases = {name: [draw(size) for size in sizes[name]] for name in names} if case.biases else {}
    chosen = case.choose(case.tokens, experts, case.k, rng)
    slots = [expert for row in chosen for expert in row]
    scores = torch.rand(len(slots), generator=rng).to(device) if case.weighted else None
    ids = torch.tensor(slots, dtype=torch.int64)
    lengths = [len(row) for row in chosen]
    if set(lengths) == {case.k}:
        dispatch = route(ids.view(case.tokens, case.k).to(device), experts)
    else:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        dispatch = route(ids.to(device), experts, offsets.to(device))
    weights = arranged(gate, up, down, biases, case)
    problem = Problem(x, gate, up, down, chosen, scores, grad, case.activation, biases)
    return Made(problem, weights, dispatch, (x, weights, dispatch, scores))


def arranged(
    gate: list[torch.Tensor] | None,
    up: list[torch.Tensor],
    down: list[torch.Tensor],
    biases: dict[str, list[torch.Tensor]],
    case: Case,
) -> ExpertWeights:
    """The weights in the layout of the case."""
    kind: dict[str, Any] = {"activation": case.activation, "gated": case.gated}
    if len(set(case.widths)) > 1:
        pairs = up if gate is None else [torch.stack(both, 1).flatten(0, 1) for both in zip(gate, up, strict=True)]
        rows = torch.cat([matrix.T for matrix in down])
        return ExpertWeights(torch.cat(pairs), rows, interleaved=case.gated, widths=case.widths, **kind)
    stacked_up, stacked_down = torch.stack(up), torch.stack(down)
    interleaved = "interleaved" in case.layout
    if gate is not None:
        both = torch.stack(gate), stacked_up
        stacked_up = torch.stack(both, 2).flatten(1, 2) if interleaved else torch.cat(both, 1)
    if "transposed" in case.layout:
        stacked_up, stacked_down = stacked_up.mT.contiguous(), stacked_down.mT.contiguous()
    if biases:
        kind["up_bias"], kind["down_bias"] = torch.stack(biases["up"]), torch.stack(biases["down"])
        if gate is not None:
            kind["up_bias"] = torch.cat([torch.stack(biases["gate"]), kind["up_bias"]], 1)
    weights = ExpertWeights(
        stacked_up, stacked_down, interleaved=interleaved, transposed="transposed" in case.layout, **kind
    )
    return pack(weights) if case.layout == "packed" else weights
