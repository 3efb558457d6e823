"""Whether a stage's learning rate spares what conversion taught the routers."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.trainers.optimizing.parameter_groups import parts
from upcycle.trainers.recipe.part_recipes import GroupParameters

UNTAUGHT = ("random", "zero", "cool")  # routers that have nothing to lose
LARGE = 0.1  # of a weight's size: a few such steps and nothing is left of it
SMALL = 0.01


def router_warning(model: nn.Module, rates: GroupParameters, origin: Path) -> str | None:
    """Why the routers of a model converted to ``origin`` should train with less; ``None``: they may.

    The scale convention ``exact`` needs experts of nearly the same weight, so routers come cooled: they choose as they were taught to,
    by very small weights. AdamW's steps are as large as the learning rate, whatever a weight's size.

    Args:
        model: with what trains chosen.
        rates: of the stage.
        origin: folder with the record of a conversion, or any other.
    """
    record = origin / records.FILE
    if not record.is_file():
        return None
    router = (read_json(record).get("router") or {}).get("name")
    belongs = parts(model)
    learning = [
        p for name, p in model.named_parameters() if belongs[name] == "router" and p.ndim > 1 and p.requires_grad
    ]
    if router is None or router in UNTAUGHT or not learning:
        return None
    size = math.sqrt(sum(float(weight.detach().float().square().mean()) for weight in learning) / len(learning))
    step = rates.learning_rate * rates.router
    if not size or step <= LARGE * size:
        return None
    factor = 10 ** math.floor(math.log10(SMALL * size / rates.learning_rate))
    return (
        f"the routers' weights are about {size:.1g} large, and a step moves each by up to {step:.1g}: what they were taught "
        f"('{router}') is lost at once; the stage's rates: {{router: {factor:g}}} keeps it, or train: [experts, rest]"
    )
