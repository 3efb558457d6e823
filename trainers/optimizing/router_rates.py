"""Whether a stage's learning rate is small enough to keep what the conversion taught the routers."""

from __future__ import annotations

import math
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


def router_warning(model: nn.Module, rates: GroupParameters, origin: Path) -> str | None:
    """A warning if the learning rate of converted routers would destroy what they were taught; ``None``: it does not.

    The scale convention ``exact`` needs routers that weigh their experts nearly equally, so a conversion makes their weights very
    small. AdamW's steps are as large as the learning rate, whatever the size of a weight.

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
    step = rates.learning_rate * rates.router
    if not size or step <= LARGE_STEP * size:
        return None
    factor = 10 ** math.floor(math.log10(SMALL * size / rates.learning_rate))
    return (
        f"the routers' weights are about {size:.1g}, and a step changes each by up to {step:.1g}: what the conversion taught them "
        f"('{router}') is lost at once; to keep it, set the stage's rates: {{router: {factor:g}}}, or train: [experts, rest]"
    )


def _mean_square(weight: torch.Tensor) -> float:
    with gathered(weight):
        return float(weight.detach().float().square().mean())
