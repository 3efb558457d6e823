"""The next-token loss, term by term."""

from __future__ import annotations

import math

import torch

from upcycle.trainers.losses.next_token import next_token_losses


def test_next_token_losses_with_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=rng, dtype=torch.float64)
    ids = torch.randint(7, (2, 5), generator=rng)
    found = next_token_losses(logits, ids)
    assert found.shape == (2, 4)
    for b in range(2):
        for t in range(4):
            total = sum(math.exp(float(value)) for value in logits[b, t])
            wanted = math.log(total) - float(logits[b, t, ids[b, t + 1]])
            assert abs(float(found[b, t]) - wanted) < 1e-12


def test_half_precision_is_widened() -> None:
    logits = torch.randn(1, 3, 11, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.tensor([[1, 2, 3]])
    assert next_token_losses(logits, ids).dtype == torch.float32
    assert torch.equal(next_token_losses(logits, ids), next_token_losses(logits.float(), ids))


def test_the_last_position_has_no_loss_and_no_gradient() -> None:
    rng = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (2, 4), generator=rng)
    next_token_losses(logits, ids).sum().backward()
    wanted = logits.detach().softmax(-1)
    wanted[:, -1] = 0
    for b in range(2):
        for t in range(3):
            wanted[b, t, ids[b, t + 1]] -= 1
    assert logits.grad is not None
    assert torch.equal(logits.grad[:, -1], torch.zeros(2, 7, dtype=torch.float64))
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-12, atol=1e-14)
