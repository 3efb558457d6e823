"""Switch's balance loss against its formula, written with loops over tokens and experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from upcycle.errors import UsageError
from upcycle.trainers.losses.base import make_losses

T, E, K = 12, 5, 2


def softmax(row: torch.Tensor) -> list[torch.Tensor]:
    total = sum(z.exp() for z in row)
    return [z.exp() / total for z in row]


def naive(logits: torch.Tensor, rows: list[int], fraction: str = "choices") -> torch.Tensor:
    """``E sum_i f_i P_i`` of the tokens ``rows``, top-k normalised softmax routing."""
    load: list[Any] = [0.0] * E
    probability: list[Any] = [0.0] * E
    for t in rows:
        p = softmax(logits[t])
        best = sorted(range(E), key=lambda i: -p[i].item())[:K]
        for rank, i in enumerate(best):
            if fraction == "choices":
                load[i] += 1 / (len(rows) * K)
            elif fraction == "weights":
                load[i] += p[i] / sum(p[j] for j in best) / len(rows)
            elif rank == 0:
                load[i] += 1 / len(rows)
        for i in range(E):
            probability[i] += p[i] / len(rows)
    return E * sum(load[i] * probability[i] for i in range(E))  # type: ignore[return-value]


def made(**parameters: Any) -> Any:
    return make_losses({"switch_balance": {"coefficient": 1.0, **parameters}})[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


@pytest.mark.parametrize("fraction", ["choices", "first", "weights"])
def test_batch_level(fraction: str, logits: torch.Tensor, record: Any) -> None:
    expected = naive(logits, list(range(T)), fraction)
    actual = made(fraction=fraction)([record(logits, K)])
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    wanted, got = (torch.autograd.grad(value, logits)[0] for value in (expected, actual))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-15)


def test_sequence_level_is_the_mean_over_sequences_that_count(logits: torch.Tensor, record: Any) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    mask[2] = False
    expected = (naive(logits, [0, 1, 2, 3]) + naive(logits, [4, 5])) / 2
    torch.testing.assert_close(made(scope="sequence")([record(logits, K)], mask), expected, rtol=1e-13, atol=0)


def test_layers_are_not_pooled(record: Any) -> None:
    """Two layers that each use one half of the experts look balanced together, and are not."""
    one = torch.tensor([[9.0, 8.0, 0.0, 0.0]] * 6)
    records = [record(one, layer=0), record(one.flip(1), layer=1)]
    each = [made()([r]) for r in records]
    assert all(value > 1.9 for value in each)
    assert made()(records) == sum(each)
    assert made(layers="mean")(records) == sum(each) / 2


def test_uniform_is_one(record: Any) -> None:
    cycle = torch.eye(4, dtype=torch.float64).repeat(3, 1)  # every expert equally often, equally probable on the whole
    assert made()([record(cycle, 1)]).item() == pytest.approx(1, rel=1e-14)


def test_sequence_level_needs_sequences_and_masks_their_tokens(logits: torch.Tensor, record: Any) -> None:
    with pytest.raises(UsageError, match=r"needs a mask \[B, S\]"):
        made(scope="sequence")([record(logits, K)])
    with pytest.raises(UsageError, match="the mask has 6 tokens, but 12"):
        made()([record(logits, K)], torch.ones(2, 3, dtype=torch.bool))


def test_gradient_reaches_the_router_of_a_stock_model(stock: Any, ids: torch.Tensor) -> None:
    from upcycle.trainers.routing.router_records import capture
    from upcycle.trainers.routing.stock_routers import moe_layers

    model, seen = stock("mixtral"), {}
    router = moe_layers(model)[-1].router  # the last one: no other layer's loss reaches it
    router.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0].detach()))
    with capture(model) as recorder:
        model(ids)
        made()(recorder.take()).backward()
    rows = router.weight.detach().double().requires_grad_()
    stock_balance(linear(seen["x"].reshape(-1, 32).double(), rows)).backward()
    # fp32 through E and T: a few roundings of 6e-8 of the largest gradient each.
    torch.testing.assert_close(router.weight.grad.double(), rows.grad, rtol=0, atol=1e-6 * rows.grad.abs().max().item())


def stock_balance(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    f = torch.zeros_like(p).scatter_(1, p.topk(2).indices, 1.0).mean(0) / 2
    return p.shape[1] * (f * p.mean(0)).sum()
