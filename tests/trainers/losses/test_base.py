"""How losses are put together: coefficients, ramps, layers, ranks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.distributed.reduction import Reduction
from upcycle.trainers.losses.base import auxiliary_losses, make_losses


def two_ranks(parts: list[torch.Tensor]) -> Any:
    """A sum over ranks that are run one after another: all their vectors are known beforehand."""
    return Reduction(lambda _: torch.stack(parts).sum(0), ranks=2)


def test_totals_average_to_the_gradient_of_the_sum() -> None:
    parts = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])]
    gradients = []
    for part in parts:
        local = part.clone().requires_grad_()
        total = two_ranks(parts).total(local)
        assert total.tolist() == [4.0, 3.0]
        total.square().sum().backward()
        gradients.append(local.grad)
    for gradient in gradients:  # each rank's parameters get half of this: the gradient is averaged over two ranks
        assert (gradient / 2).tolist() == [8.0, 6.0]  # type: ignore[operator]


def test_the_exchange_is_one_for_all_losses_and_layers(record: Any) -> None:
    calls = []

    def add(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return 2 * x

    losses = make_losses({"switch_balance": {}, "router_z": {}})
    records = [record(torch.randn(6, 4), layer=layer) for layer in range(3)]
    auxiliary_losses(losses, {"router": records}, reduction=Reduction(add, 2))
    assert calls == [(3 * (2 * 4 + 1) + 3 * 2,)]


def test_a_ramp_scales_the_loss_up_to_its_end(record: Any) -> None:
    records = {"router": [record(torch.randn(6, 4))]}
    flat, rising = make_losses({"router_z": {}}), make_losses({"router_z": {"ramp": 0.5}})
    full = auxiliary_losses(flat, records)["router_z"]
    for progress, factor in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        actual = auxiliary_losses(rising, records, progress=progress)["router_z"]
        torch.testing.assert_close(actual, factor * full)


@pytest.mark.parametrize(
    ("named", "message", "hint"),
    [
        ({"swich_balance": {}}, "unknown loss 'swich_balance'", "did you mean 'switch_balance'"),
        ({"router_z": {"coeficient": 1}}, "losses.router_z.coeficient", "coefficient"),
        ({"router_z": {"coefficient": -1}}, "losses.router_z.coefficient", "parameters of router_z"),
    ],
)
def test_wrong_names_and_parameters(named: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_losses(named)
    assert hint in str(caught.value.hint)


def test_missing_records_are_refused() -> None:
    with pytest.raises(UsageError, match="router_z reads router records"):
        auxiliary_losses(make_losses({"router_z": {}}), {"router": []})
    assert auxiliary_losses([], {}) == {}
