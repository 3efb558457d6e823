"""The exact answer, by loops over tokens in fp64 and autograd, and how far from it a kernel may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F  # noqa: N812

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda value: F.gelu(value, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda value: F.relu(value) ** 2,
}


@dataclass
class Problem:
    """One layer with a matrix of its own for every expert, and which experts every token has."""

    x: torch.Tensor
    gate: list[torch.Tensor] | None
    """``[I, H]`` each."""
    up: list[torch.Tensor]
    down: list[torch.Tensor]
    """``[H, I]`` each."""
    chosen: list[list[int]]
    """Experts of every token, in the order of its slots; ids of E and more are dropped."""
    scores: torch.Tensor | None
    """fp32 ``[S]``."""
    grad: torch.Tensor
    activation: str = "silu"
    biases: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Of "gate", "up" and "down", if any."""


@dataclass
class Answer:
    """The output and all gradients, in fp64."""

    output: torch.Tensor
    x: torch.Tensor
    gate: list[torch.Tensor] | None
    up: list[torch.Tensor]
    down: list[torch.Tensor]
    scores: torch.Tensor | None
    biases: dict[str, list[torch.Tensor]]


def solve(problem: Problem) -> Answer:
    """The exact answer for the problem's numbers as they are stored."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().double().requires_grad_()

    x, scores = leaf(problem.x), None if problem.scores is None else leaf(problem.scores)
    up, down = [leaf(tensor) for tensor in problem.up], [leaf(tensor) for tensor in problem.down]
    gate = None if problem.gate is None else [leaf(tensor) for tensor in problem.gate]
    biases = {name: [leaf(tensor) for tensor in tensors] for name, tensors in problem.biases.items()}
    act, slot = ACTIVATIONS[problem.activation], 0
    outputs = []

    def product(name: str, matrices: list[torch.Tensor], expert: int, value: torch.Tensor) -> torch.Tensor:
        result = matrices[expert] @ value
        return result + biases[name][expert] if name in biases else result

    for token, experts in enumerate(problem.chosen):
        total = x[token] * 0.0
        for expert in experts:
            if expert < len(up):
                value = product("up", up, expert, x[token])
                value = act(value) if gate is None else act(product("gate", gate, expert, x[token])) * value
                part = product("down", down, expert, value)
                total = total + (part if scores is None else scores[slot] * part)
            slot += 1
        outputs.append(total)
    output = torch.stack(outputs)
    output.backward(problem.grad.cpu().double())

    def found(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    return Answer(
        output.detach(),
        found(x),
        None if gate is None else [found(tensor) for tensor in gate],
        [found(tensor) for tensor in up],
        [found(tensor) for tensor in down],
        None if scores is None else found(scores),
        {name: [found(tensor) for tensor in tensors] for name, tensors in biases.items()},
    )


def tolerance(dtype: torch.dtype, roundings: int, depth: int) -> float:
    """The largest relative RMS error that rounding explains.

    Every one of ``roundings`` results that are stored has a relative error of at most u, half the distance of neighbours; they
    are independent, hence their squares add up, and an activation multiplies them by at most 2 or so. Sums of ``depth``
    products are fp32, where a GPU's three TF32 products have u of 2^-22.
    """
    u = torch.finfo(dtype).eps / 2
    return 2 * math.sqrt(roundings) * u + math.sqrt(depth) * 2.0**-22


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The RMS error relative to the exact values' RMS; where those are all zero, the error itself."""
    exact = exact.detach().cpu()
    error = (found.detach().cpu().double() - exact).norm()
    scale = exact.norm()
    return float(error / scale) if scale else float(error)


def cosine(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The cosine between two tensors as vectors; 1 where both are zero."""
    found, exact = found.detach().cpu().double().flatten(), exact.detach().cpu()
    scale = float(found.norm() * exact.norm())
    return float(found @ exact.flatten()) / scale if scale else float(bool((found == 0).all() and (exact == 0).all()))
