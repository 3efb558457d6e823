"""``upcycle export``: turns a training checkpoint into a folder that stock transformers loads."""

from __future__ import annotations

from pathlib import Path

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json
from upcycle.formatting import size


@click.command("export", short_help="Write a checkpoint for transformers")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
    default="keep",
    show_default=True,
    help="dtype of the weights; keep: as in the model that training began with",
)
@click.option(
    "--layout",
    type=click.Choice(["keep", "per-expert", "fused"]),
    default="keep",
    show_default=True,
    help="how experts are stored; keep: as in the model that training began with",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="largest weight file")
@click.option("--overwrite", is_flag=True, help="replace an OUT that upcycle wrote, once the new model is complete")
@quiet_option
@common_options
def command(
    checkpoint: Path,
    out: Path,
    dtype: str,
    layout: str,
    max_shard_size: str,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Write the model of CHECKPOINT into the folder OUT as stock transformers stores it.

    CHECKPOINT is a checkpoint of a run, such as run/checkpoints/step-00000100, or the run's folder, which stands for its newest
    checkpoint. upcycle verify and upcycle evaluate read OUT. How many ranks trained the model, and how they divided it, makes
    no difference to OUT.
    """
    from upcycle.trainers.checkpoints.export import export

    result = export(
        checkpoint,
        out,
        dtype=dtype,
        layout=layout,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=ProgressBars(quiet),
    )
    if as_json:
        print_json(result.as_dict())
        return
    print_facts(
        [
            ("output", f"{result.out} ({size(result.bytes)}, {result.dtype}, {result.layout})"),
            ("trained", f"{result.step:,} steps, {result.tokens:,} tokens"),
            ("next", f"upcycle evaluate {result.out}"),
        ]
    )
