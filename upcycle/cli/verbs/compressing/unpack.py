"""``upcycle unpack``: writes the model that ``upcycle pack`` stored."""

from __future__ import annotations

from pathlib import Path

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json
from upcycle.formatting import size


@click.command("unpack", short_help="Write the model that upcycle pack stored")
@click.argument("packed", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="replace an OUT that upcycle wrote, once the new folder is complete")
@quiet_option
@common_options
def command(packed: Path, out: Path, overwrite: bool, quiet: bool, as_json: bool, debug: bool) -> None:
    """Write the model that PACKED holds into the folder OUT, the same files byte for byte.

    Stock transformers loads OUT, and every verb of upcycle takes it. A file that is damaged is named.
    """
    from upcycle.methods.compressing.qmoe_codec.packing import unpack_model

    found = unpack_model(packed, out, overwrite=overwrite, progress=ProgressBars(quiet))
    if as_json:
        print_json(found.as_dict())
        return
    print_facts([("output", f"{out} ({size(found.bytes)})"), ("next", f"upcycle generate {out} --prompt TEXT")])
