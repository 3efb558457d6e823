"""Expert choice: the paper's formula in fp64, sequences that do not see one another, and padding that is no token."""

from __future__ import annotations

import math

import pytest
import torch

from upcycle.models.own.routing.expert_choice import ExpertChoiceRule

N, B, E = 9, 4, 5
FACTORS = [0.4, 1, 2, 2.7, E]


def logits() -> torch.Tensor:
    """Of B sequences of N tokens."""
    return torch.randn(B * N, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def restated(z: list[list[float]], factor: float, normalized: bool) -> list[list[float]]:
    """One group's weights, in plain Python: each expert takes the tokens of its largest softmax over experts."""
    shares = [[math.exp(one) / sum(map(math.exp, row)) for one in row] for row in z]
    room = math.ceil(len(z) * factor / E)
    weights = [[0.0] * E for _ in z]
    for expert in range(E):
        best = sorted(range(len(z)), key=lambda token: -shares[token][expert])[:room]
        for token in best:
            weights[token][expert] = shares[token][expert]
    if normalized:
        weights = [[one / sum(row) if sum(row) else 0.0 for one in row] for row in weights]
    return weights


def gates(rule: ExpertChoiceRule, z: torch.Tensor, length: int, real: torch.Tensor | None = None) -> torch.Tensor:
    routed = rule.route_sequences(z, length, real)
    every = torch.zeros(len(z), E + 1, dtype=torch.float64)
    return every.scatter_add(1, routed.experts, routed.weights)[:, :E]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("factor", FACTORS)
def test_weights_are_those_of_the_formula(factor: float, group: str, normalized: bool) -> None:
    rule = ExpertChoiceRule(factor, group, normalized)  # type: ignore[arg-type]
    z = logits()
    groups = [z] if group == "batch" else list(z.split(N))
    expected = torch.tensor([row for one in groups for row in restated(one.tolist(), factor, normalized)])
    found = gates(rule, z, N)
    assert torch.allclose(found, expected.double(), rtol=1e-6, atol=0)  # the list became fp32
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("factor", FACTORS)
def test_every_expert_takes_its_share_of_every_sequence(factor: float) -> None:
    taken = (gates(ExpertChoiceRule(factor), logits(), N) > 0).view(B, N, E).sum(1)
    assert torch.equal(taken, torch.full_like(taken, min(N, math.ceil(N * factor / E))))


def test_a_share_that_is_a_whole_number_is_not_rounded_up() -> None:
    """In floating point 25 * 2.2 / 5 is above 11."""
    z = torch.randn(25, 5, generator=torch.Generator().manual_seed(1))
    routed = ExpertChoiceRule(2.2).route(z)
    assert int((routed.experts < 5).sum()) == 5 * 11


def test_sequences_are_routed_each_for_itself() -> None:
    z = logits()
    other = torch.cat([z[:N], 3 * z[N:].flip(0)])
    alone, batch = ExpertChoiceRule(2), ExpertChoiceRule(2, "batch")
    assert torch.equal(gates(alone, z, N)[:N], gates(alone, other, N)[:N])
    assert not torch.equal(gates(batch, z, N)[:N], gates(batch, other, N)[:N])
    assert torch.equal(gates(alone, z[:N], N), gates(batch, z[:N], N))


def test_a_token_depends_on_later_ones() -> None:
    """Why no causal model may follow it."""
    z = logits()[:N]
    other = z.clone()
    other[-1] *= 20
    assert not torch.equal(gates(ExpertChoiceRule(2), z, N)[:-1] > 0, gates(ExpertChoiceRule(2), other, N)[:-1] > 0)
    assert not ExpertChoiceRule.per_token


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_is_no_token(factor: float, dtype: torch.dtype) -> None:
    """Each sequence is routed as if it were alone, and padding is taken by nobody, wherever it is."""
    z, lengths = logits(), [N, 4, 1, 0]
    real = torch.zeros(B, N, dtype=dtype)
    for row, length in enumerate(lengths):
        real[row, row : row + length] = 1  # with some in front
    rule = ExpertChoiceRule(factor)
    found = gates(rule, z, N, real.flatten()).view(B, N, E)
    assert not found[real == 0].any()
    for row, length in enumerate(lengths):
        own = z.view(B, N, E)[row, row : row + length]
        assert torch.allclose(found[row, row : row + length], gates(rule, own, max(length, 1)), rtol=1e-12)
    everyone = gates(ExpertChoiceRule(factor, "batch"), z, N, real.flatten())
    kept = real.flatten() != 0
    assert torch.allclose(everyone[kept], gates(rule, z[kept], int(kept.sum())), rtol=1e-12)


def test_no_token_at_all() -> None:
    assert ExpertChoiceRule().route(torch.zeros(0, E)).experts.shape == (0, E)


@pytest.mark.parametrize("normalized", [True, False])
def test_gradients_are_finite_differences(normalized: bool) -> None:
    z, real = logits()[: 2 * N].requires_grad_(), torch.arange(2 * N) % 5 != 2

    def weights(values: torch.Tensor) -> torch.Tensor:
        return gates(ExpertChoiceRule(1.5, normalized=normalized), values, N, real)

    assert torch.autograd.gradcheck(weights, (z,))
