"""Losses over a vocabulary by blocks of positions: equal to those of whole tensors in fp64, whatever the blocks and the strides."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from upcycle.trainers.losses import vocabulary
from upcycle.trainers.losses.vocabulary import NO_TARGET, divergences, token_nats

V = 7


@pytest.fixture(params=[1, 2 * V, 1 << 20], ids=["a position", "two positions", "all positions"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_ON_CPU", request.param)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_nats_and_their_gradient(shape: tuple[int, ...]) -> None:
    given = logits(*shape, V)
    targets = torch.randint(V, shape, generator=torch.Generator().manual_seed(1))
    targets.view(-1)[::3] = NO_TARGET
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = token_nats(given, targets)
    wanted = cross_entropy(given.view(-1, V), targets.view(-1), reduction="none", ignore_index=NO_TARGET).view(shape)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    mine, theirs = (torch.autograd.grad((each * weights).sum(), given)[0] for each in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("shape", "longer", "temperature"), [((), 0, 1.0), ((5,), 2, 0.5), ((2, 5), 3, 2.0)])
def test_divergences_and_their_gradient(shape: tuple[int, ...], longer: int, temperature: float) -> None:
    student, parent = logits(*shape, V + longer), logits(*shape, V, seed=1).detach()
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = divergences(student, parent, temperature)
    q, p = ((each[..., :V] / temperature).log_softmax(-1) for each in (student, parent))
    wanted = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    mine, theirs = (torch.autograd.grad((each * weights).sum(), student)[0] for each in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-15)


@pytest.mark.usefixtures("block")
def test_parts_of_larger_tensors_in_half_precision() -> None:
    """A slice is read where it lies; sums are those of fp32, and the gradient is rounded once."""
    whole = logits(2, 6, V, dtype=torch.bfloat16)
    parent = logits(2, 6, V, seed=1, dtype=torch.bfloat16).detach()
    targets = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(1))
    for loss in (
        lambda given: token_nats(given[:, :-1], targets),
        lambda given: divergences(given[:, :-1], parent[:, 1:]),
    ):
        full = whole.detach().float().requires_grad_()
        assert loss(whole).dtype == torch.float32
        assert torch.equal(loss(whole), loss(full))
        mine, theirs = (torch.autograd.grad(loss(each).sum(), each)[0] for each in (whole, full))
        assert torch.equal(mine, theirs.bfloat16())


def test_nothing_of_the_vocabularys_size_is_kept_but_what_was_given() -> None:
    student, parent = logits(2, 6, V), logits(2, 6, V, seed=1).detach()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_nats(student, torch.zeros(2, 6, dtype=torch.long)).sum() + divergences(student, parent).sum()
    given = {student.untyped_storage().data_ptr(), parent.untyped_storage().data_ptr()}
    assert given <= {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert all(tensor.untyped_storage().data_ptr() in given for tensor in kept if tensor.numel() >= student.numel())
