"""``upcycle pack``: stores a model with ternary experts at less than a bit per weight."""

from __future__ import annotations

from pathlib import Path

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json
from upcycle.formatting import count, size


@click.command("pack", short_help="Store a model with ternary experts in little space")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="replace an OUT that upcycle wrote, once the new folder is complete")
@quiet_option
@common_options
def command(model: Path, out: Path, overwrite: bool, quiet: bool, as_json: bool, debug: bool) -> None:
    """Store MODEL, whose experts upcycle compress --method qmoe made ternary, in the folder OUT without loss.

    OUT cannot be loaded as it is: upcycle unpack writes the same files again, byte for byte.

    \b
    upcycle compress ./moe TERNARY --method qmoe --calibration docs.txt,code.txt
    upcycle pack TERNARY SMALL
    upcycle unpack SMALL MODEL
    """
    from upcycle.methods.compressing.qmoe_codec.packing import pack_model

    packed = pack_model(model, out, overwrite=overwrite, progress=ProgressBars(quiet))
    if as_json:
        print_json(packed.as_dict())
        return
    print_facts(
        [
            ("output", f"{out} ({size(packed.bytes_packed)}, from {size(packed.bytes)})"),
            ("ternary", f"{count(packed.ternary)} weights, {packed.bits_per_weight:.3f} bits each"),
            ("next", f"upcycle unpack {out} MODEL"),
        ]
    )
