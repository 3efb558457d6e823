"""Cached distributions: which tokens are kept, where the tail goes, and that the truncated KL bounds the full one from below."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from upcycle.errors import CheckpointError, UsageError
from upcycle.trainers.distillation.losses import logits_kl
from upcycle.trainers.distillation.truncated_logits import TopLogits

N, V = 6, 9


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def kept_tokens(p: list[float], top_p: float, most: int) -> list[int]:
    mass, kept = 0.0, []
    for token in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= top_p or len(kept) == most:
            break
        kept.append(token)
        mass += p[token]
    return kept


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    student, parent = (2 * torch.randn(N, V, dtype=torch.float64, generator=rng) for _ in range(2))
    return student.requires_grad_(), parent


@pytest.mark.parametrize(("top_p", "most"), [(0.9, 64), (0.5, 64), (0.99, 3), (0.01, 5), (1.0, 64)])
def test_kl_with_one_more_outcome(top_p: float, most: int, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, parent = pair
    cached = TopLogits.of(parent, top_p, most)
    expected = []
    for s, w in zip(student.tolist(), parent.tolist(), strict=True):
        q, p = softmax(s), softmax(w)
        kept = kept_tokens(p, top_p, most)
        value = sum(p[v] * math.log(p[v] / q[v]) for v in kept)
        if len(kept) < V:
            tails = [1 - sum(x[v] for v in kept) for x in (p, q)]
            value += tails[0] * math.log(tails[0] / tails[1])
        expected.append(value)
    actual = cached.kl(student)
    # Log probabilities are stored in fp32: each term is off by 2^-24 of a log of at most 10.
    assert actual.tolist() == pytest.approx(expected, abs=10 * 2 * 2**-24)
    full = torch.stack([logits_kl(a, b) for a, b in zip(student, parent, strict=True)])
    assert (actual <= full + 1e-6).all()
    assert torch.autograd.gradcheck(lambda x: cached.kl(x).sum(), (student,))


def test_everything_kept_is_the_full_kl(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, parent = pair
    cached = TopLogits.of(parent, 1.0, V)
    wanted = torch.autograd.grad(logits_kl(student, parent), student)[0]
    got = torch.autograd.grad(cached.kl(student).mean(), student)[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_all_mass_on_the_kept_tokens_is_not_the_best(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, parent = pair
    cached = TopLogits.of(parent, 0.5)
    greedy = parent.clone()
    for row, tokens in zip(greedy, cached.tokens.tolist(), strict=True):
        row[[v for v in range(V) if v not in tokens]] = -40.0
    assert (cached.kl(greedy) > cached.kl(parent) + 0.1).all()
    torch.testing.assert_close(cached.kl(parent), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-6)


def test_cached_logits_survive_a_file_and_a_damaged_file_is_refused(
    tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    student, parent = pair
    cached = TopLogits.of(parent.view(2, 3, V), 0.8)
    assert cached.tokens.shape[0] == N
    path = tmp_path / "logits.safetensors"
    cached.save(path)
    again = TopLogits.load(path)
    assert torch.equal(again.kl(student), cached.kl(student))
    assert torch.equal(again.positions(slice(2, 4)).kl(student[2:4]), cached.kl(student)[2:4])
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="holds no cached logits"):
        TopLogits.load(path)


def test_wrong_positions_and_bad_top_p_are_refused(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, parent = pair
    with pytest.raises(UsageError, match="cached logits of 6 positions, but the student has 5"):
        TopLogits.of(parent).kl(student[:5])
    for top_p, most in ((0.0, 5), (1.5, 5), (0.5, 0)):
        with pytest.raises(UsageError, match="top_p"):
            TopLogits.of(parent, top_p, most)
