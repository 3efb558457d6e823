"""``upcycle plan run``: simulates where the experts of a MoE are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_facts, print_json, print_table
from upcycle.formatting import size


@click.command("plan run")
@click.argument("moe")
@click.option(
    "--observations",
    required=True,
    type=click.Path(path_type=Path),
    help="file that upcycle observe wrote of MOE: how many tokens chose each expert",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=1, show_default=True, help="tokens per step, of all sequences"
)
@click.option("--link", default="32GB/s", show_default=True, help="between the experts' memory and the device")
@click.option("--device-flops", default="300TFLOPS", show_default=True, help="speed of the device")
@click.option("--device-memory", default="2TB/s", show_default=True, help="speed of the device's memory")
@click.option(
    "--near-flops", default="1TFLOPS", show_default=True, help="speed of what computes near the experts' memory"
)
@click.option("--near-memory", default="200GB/s", show_default=True, help="speed of the experts' memory for it")
@common_options
def command(
    moe: str,
    observations: Path,
    tokens: int,
    link: str,
    device_flops: str,
    device_memory: str,
    near_flops: str,
    near_memory: str,
    as_json: bool,
    debug: bool,
) -> None:
    """Simulate running the Mixture-of-Experts MOE with its experts in the host's memory: which of them the device computes.

    An expert with many tokens goes over the link; one with few is computed where it lies, and only its tokens go over the link
    (MoNDE). Both run at the same time. The table says, per layer, how many experts go to the device and what a step's experts take
    then, with all parameters moved, and with all activations moved. No weight is read.

    \b
    upcycle observe ./moe seen.safetensors --calibration docs.txt
    upcycle plan run ./moe --observations seen.safetensors --link 16GB/s --tokens 64
    """
    from upcycle.planning.near_data import ComputingUnit, LinkedMemories, parse_rate, plan_run

    machine = LinkedMemories(
        ComputingUnit(
            parse_rate(device_flops, "--device-flops", "FLOPS"), parse_rate(device_memory, "--device-memory", "B/s")
        ),
        ComputingUnit(parse_rate(near_flops, "--near-flops", "FLOPS"), parse_rate(near_memory, "--near-memory", "B/s")),
        parse_rate(link, "--link", "B/s"),
    )
    plan = plan_run(moe, observations, machine, tokens)
    if as_json:
        print_json(plan.as_dict())
        return
    best, moved, near = (plan.total(name) for name in ("seconds", "all_on_device", "all_near_data"))
    print_facts(
        [
            ("simulation", f"steps of {tokens:,} tokens by MoNDE's rule, from observed loads; nothing was run"),
            ("experts", f"{plan.experts} of {size(plan.expert_bytes)} in {len(plan.layers)} layers, top-{plan.top_k}"),
        ]
    )
    print_table(
        ["layer", "to the device", "of the tokens", "worth it alone", "time", "all moved", "all near"],
        [_row(layer, plan.experts) for layer in plan.layers],
        right=range(7),
    )
    print_facts(
        [
            ("time", f"{_milliseconds(best)} per step for the experts"),
            (
                "against",
                f"{moved / best:.2f}x faster than moving all parameters, {near / best:.2f}x than computing all near them",
            ),
        ]
    )


def _row(layer: Any, experts: int) -> list[str]:
    times = (layer.seconds, layer.all_on_device, layer.all_near_data)
    return [
        str(layer.layer),
        f"{len(layer.device)} of {experts}",
        f"{layer.share:.0%}",
        str(layer.worth_moving),
        *map(_milliseconds, times),
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
