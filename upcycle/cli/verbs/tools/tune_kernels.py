"""``upcycle tune-kernels``: finds the fastest tiles on this GPU for one layer's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import note, print_facts, print_json
from upcycle.errors import UsageError
from upcycle.files.output.ownership import check_overwritable, holds_keys

_DTYPES = ("bfloat16", "float16", "float32")


def _numbers(_: Any, __: Any, value: str) -> list[int]:
    try:
        found = [int(part) for part in value.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UsageError(f"--tokens takes numbers of at least 1, got '{value}'", hint="--tokens 1,64,8192")
    return found


def _is_tiles(text: str) -> bool:
    """Return whether a file's text is a table of tiles, whose keys are kinds of GPUs."""
    return holds_keys()(text) and text.lstrip().startswith(('{\n "sm', '{\n "gfx'))


@click.command("tune-kernels", short_help="Find the fastest kernel tiles on a GPU")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--hidden", type=click.IntRange(1), required=True, help="hidden size of the model")
@click.option("--width", type=click.IntRange(1), required=True, help="intermediate size of one expert")
@click.option("--experts", type=click.IntRange(1), required=True, help="routed experts of a layer")
@click.option("--top-k", type=click.IntRange(1), required=True, help="experts per token")
@click.option(
    "--tokens", default="8,512,8192", callback=_numbers, help="tokens per batch, several sizes  [default: 8,512,8192]"
)
@click.option("--dtype", type=click.Choice(_DTYPES), default="bfloat16", help="dtype of the weights")
@click.option("--stacked", is_flag=True, help="time weights as transformers stores them instead of packed ones")
@quiet_option
@common_options
def command(out: Path, quiet: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Time the experts' kernels on this GPU and write the fastest tiles to OUT, a JSON file.

    Needs a CUDA device. To use the tiles, set UPCYCLE_TILES=OUT; without it, the tiles that come with upcycle are used.

    \b
    upcycle tune-kernels tiles.json --hidden 2048 --width 768 --experts 128 --top-k 8
    """
    from upcycle.kernels.layout.devices import gpu

    if options["top_k"] > options["experts"]:
        raise UsageError(
            f"--top-k is {options['top_k']}, but --experts only {options['experts']}",
            hint="choose at most as many experts per token as there are experts",
        )
    check_overwritable(out, _is_tiles)
    device = gpu()
    import torch

    from upcycle.kernels.gpu.tile_table import gpu_kind
    from upcycle.kernels.gpu.timing.tune import tune
    from upcycle.kernels.layout.expert_weights import ExpertWeights

    experts, width, hidden = options["experts"], options["width"], options["hidden"]
    shapes = (
        [(experts, 2 * width, hidden), (experts, hidden, width)]
        if options["stacked"]
        else [(2 * experts * width, hidden), (experts * width, hidden)]
    )
    up, down = (torch.randn(shape, dtype=getattr(torch, options["dtype"]), device=device) for shape in shapes)
    weights = (
        ExpertWeights(up, down)
        if options["stacked"]
        else ExpertWeights(up, down, interleaved=True, widths=(width,) * experts)
    )
    kind = gpu_kind(torch.cuda.get_device_capability(device))
    table = tune(weights, options["tokens"], options["top_k"], kind, _seconds, (lambda _: None) if quiet else note)
    table.save(out)
    facts = {"output": str(out), "gpu": torch.cuda.get_device_name(device), "kind": kind}
    if as_json:
        print_json(facts)
    else:
        print_facts([*facts.items(), ("next", f"set UPCYCLE_TILES={out} for commands that run a model")])


def _seconds(run: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))
