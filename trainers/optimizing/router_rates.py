"""Learning rates that keep what a conversion taught the routers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.trainers.distributed.gathering import gathered, shape_of
from upcycle.trainers.optimizing.parameter_groups import parts
from upcycle.trainers.recipe.part_recipes import GroupParameters

UNTAUGHT = ("random", "zero", "cool")  # routers that were taught nothing
LARGE_STEP = 0.1  # a step of this fraction of a weight's size: after a few of them, nothing is left of the weight
SMALL = 0.01  # a step of this fraction is harmless


@dataclass(frozen=True)
class FittedRouters:
    """Routers whose weights are so small that the learning rate of all others would undo what they were taught.

    The scale convention ``exact`` needs routers that weigh their experts nearly equally, so a conversion makes their weights very
    small. AdamW's steps are as large as the learning rate, whatever the size of a weight.

    Attributes:
        router: who taught them.
        size: root mean square of their weights.
        learning_rate: the stage's, of everything.
        factor: on the learning rate of routers, so that a step changes a weight by about a hundredth of its size or less.
    """

    router: str
    size: float
    learning_rate: float
    factor: float

    def spared(self, factor: float) -> str:
        """A sentence for who has said nothing about routers, and gets ``factor``, that of the stage's beginning."""
        return (
            f"routers ('{self.router}', weights of about {self.size:.1g}) train at {factor:g} of the learning rate, which would "
            "undo what the conversion taught them (the stage's rates: {router: ...} sets another factor)"
        )

    def warning(self, rate: float) -> str:
        """A sentence for who has set another factor; ``rate`` is the learning rate with it."""
        return (
            f"the routers' weights are about {self.size:.1g}, and a step changes each by up to {rate:.1g}: what the conversion taught "
            f"them ('{self.router}') is lost at once; to keep it, set the stage's rates: {{router: {self.factor:g}}}, or "
            "train: [experts, rest]"
        )


def fitted_routers(model: nn.Module, rates: GroupParameters, origin: Path) -> FittedRouters | None:
    """Tell whether the learning rate of converted routers would destroy what they were taught; ``None``: it does not.

    Args:
        model: the model, with ``requires_grad`` set on what trains; where its weights are divided, all ranks call this together.
        rates: the stage's.
        origin: the folder that the run starts from, with or without the record of a conversion.
    """
    record = origin / records.FILE
    if not record.is_file():
        return None
    router = (read_json(record).get("router") or {}).get("name")
    belongs = parts(model)
    learning = [
        p
        for name, p in model.named_parameters()
        if belongs[name] == "router" and len(shape_of(p)) > 1 and p.requires_grad
    ]
    if router is None or router in UNTAUGHT or not learning:
        return None
    size = math.sqrt(sum(map(_mean_square, learning)) / len(learning))
    if not size or rates.learning_rate * rates.router <= LARGE_STEP * size:
        return None
    factor = 10 ** math.floor(math.log10(SMALL * size / rates.learning_rate))
    return FittedRouters(router, size, rates.learning_rate, factor)


def _mean_square(weight: torch.Tensor) -> float:
    with gathered(weight):
        return float(weight.detach().float().square().mean())
