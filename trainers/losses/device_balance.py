"""DeepSeekMoE's device-level balance loss: groups of experts that share a device should be equally busy. E experts."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.losses.switch_balance import shares
from upcycle.trainers.routing.router_records import RouterRecord


class DeviceBalanceParameters(LossParameters):
    """Parameters of :class:`DeviceBalance`."""

    coefficient: float = Field(0.05, ge=0, description="what the loss is multiplied by")
    devices: int = Field(2, ge=1, description="groups of consecutive experts, as expert parallelism places them")


class DeviceBalance(Loss):
    """``sum_j f'_j P'_j`` over groups j of experts (DeepSeekMoE, arXiv 2401.06066, eq. 15-17).

    f' is the mean of its experts' ``f_i = E / (K T)`` times the number of tokens that chose i, without gradient; P' is the sum
    of their mean probabilities. It is 1 where groups are equally loaded, whatever happens within them. The default coefficient
    is that of the paper's 145B model.
    """

    name = "device_balance"
    title = "Device-level balance (DeepSeekMoE)"
    paper = "https://arxiv.org/abs/2401.06066"
    Parameters = DeviceBalanceParameters
    parameters: DeviceBalanceParameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[2 E + 1]``: shares of the choices, probabilities, and the number of tokens."""
        load = record.load
        return torch.cat([counted(load, mask), counted(record.probabilities, mask), token_count(load, mask)])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens.

        Raises:
            UsageError: the experts do not divide into groups of equal size.
        """
        load, probability = shares(sums)
        devices = self.parameters.devices
        if len(load) % devices:
            raise UsageError(
                f"losses.device_balance.devices: {devices} does not divide {len(load)} experts",
                hint="use the expert-parallel size",
            )
        groups = (len(load) * load).view(devices, -1).mean(1)
        return (groups * probability.view(devices, -1).sum(1)).sum()
