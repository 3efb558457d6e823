"""``upcycle plan train``: estimates what a training run needs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import note, print_facts, print_json, print_table, warn
from upcycle.cli.verbs.train import set_option
from upcycle.formatting import count, duration, size


@click.command("plan train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--world", help="8xH100, 2x8xH100 (machines x devices), or a number of ranks on CPUs  [default: this machine]"
)
@click.option("--model", help="train this model instead of the one in the recipe")
@set_option
@click.option(
    "--dense-tokens", type=click.FloatRange(min=1), help="tokens that the dense model was trained on, e.g. 2e12"
)
@click.option("--dense", help="the dense model, if MODEL has no record of what it was converted from")
@common_options
def command(
    recipe: Path,
    world: str | None,
    model: str | None,
    set_: dict[str, Any],
    dense_tokens: float | None,
    dense: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Estimate what the training run in RECIPE needs: memory per rank, bytes sent per step, and bounds on tokens per second.

    RECIPE is a YAML file, or the name of a recipe that comes with upcycle (upcycle list recipes).

    The table has a row for every ZeRO stage and every expert-parallel size that the trainer supports. Its column tokens/s is the
    bound if communication overlaps perfectly with computation, the column apart the bound if it does not overlap at all. The
    recommended row has the highest bound without overlap among those that fit into memory. No weight is read. Devices: A100,
    A100-40GB, H100, H200, B200, L40S.

    \b
    upcycle plan train recipe.yaml --world 8xH100
    upcycle plan train recipe.yaml --world 128x8xH200 --set global_batch=4096 --dense-tokens 2e12
    """
    from upcycle.trainers.forecast.plan_training import plan_training, read_planned

    parsed = read_planned(recipe, {**({"model": model} if model else {}), **set_})
    plan = plan_training(parsed, world, dense_tokens, dense)
    if as_json:
        print_json({**plan.as_dict(), "command": next_command(plan, recipe, model, set_)})
        return
    _show(plan, next_command(plan, recipe, model, set_))


def _show(plan: Any, command_line: str | None) -> None:
    device, counts = plan.world.device, plan.counts
    several = f", {plan.world.nodes} machines" if plan.world.nodes > 1 else ""
    print_facts(
        [
            ("estimate", f"{plan.world.size:,} x {device.title}{several}; nothing was run"),
            ("parameters", f"{count(counts.elements)} total, {count(counts.active)} active"),
            ("run", f"{plan.steps:,} steps, {count(plan.tokens)} tokens, {count(counts.flops.total)} FLOPs per token"),
        ]
    )
    print_table(
        [
            "ZeRO",
            "EP",
            "weights",
            "gradients",
            "states",
            "buffers",
            "activations",
            "memory",
            "sent/step",
            "tokens/s",
            "apart",
            "by",
            "",
        ],
        [_row(plan, option) for option in plan.options],
        right=range(11),
    )
    note(_loading(plan.options))
    if plan.refused:
        note(f"no row divides the experts among ranks: {plan.refused}")
    for warning in plan.warnings:
        warn(warning)
    if plan.own and plan.recommended and not plan.own.fits:
        warn(f"with the recipe's own settings, a rank needs {size(plan.own.memory.total)} of {size(device.memory)}")
    if plan.recommended is None:
        warn(f"no row fits into the {size(device.memory)} of a device")
        print_facts(
            [
                (
                    "next",
                    "use more ranks, a smaller micro_batch, activation_checkpointing: true, or zero.offload_optimizer: true",
                )
            ]
        )
        return
    hours = plan.tokens / plan.recommended.speed.bound
    print_facts(
        [("time", f"at least {duration(hours)}: the bound, which no run reaches"), ("next", command_line or "")]
    )


def _loading(options: Sequence[Any]) -> str:
    """Say what passes through the host's memory before the first step."""
    whole = max((option.memory.loading for option in options if option.zero_stage < 3), default=0.0)
    parts = max((option.memory.loading for option in options if option.zero_stage == 3), default=0.0)
    found = [f"below ZeRO 3, every rank first loads all weights ({size(whole)})"] if whole else []
    if parts:
        found.append(f"in ZeRO 3, weights are divided while they are read, the largest layer ({size(parts)}) at a time")
    return "host memory: " + "; ".join(found)


def _row(plan: Any, option: Any) -> Sequence[str]:
    memory = option.memory
    held = (memory.weights + memory.parent, memory.gradients, memory.optimizer, memory.buffers, memory.activations)
    marks = [
        "recommended" if option is plan.recommended else "",
        "the recipe's" if option is plan.own else "",
        "" if option.fits else "does not fit",
    ]
    return [
        str(option.zero_stage),
        str(option.expert_parallel),
        *map(size, held),
        size(memory.total),
        size(option.communication.total),
        count(option.speed.bound),
        count(option.speed.unoverlapped),
        option.speed.limit,
        ", ".join(filter(None, marks)),
    ]


def next_command(plan: Any, recipe: Path, model: str | None, set_: dict[str, Any]) -> str | None:
    """Return the command that trains with the settings of the recommended row; None where no row fits."""
    chosen = plan.recommended
    if chosen is None:
        return None
    words = ["upcycle", "train", str(recipe), *(["--model", model] if model else [])]
    keys = {**set_, "zero.stage": chosen.zero_stage, "expert_parallel": chosen.expert_parallel}
    for key, value in keys.items():
        words += ["--set", f"{key}={value}"]
    if plan.world.nodes > 1:
        words += ["--hostfile", "HOSTS"]
    elif plan.world.size > 1:
        words += ["--nproc", str(plan.world.size)]
    return shlex.join(words)
