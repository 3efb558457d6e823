"""``upcycle card``: writes the model card."""

from __future__ import annotations

from pathlib import Path

import click

from upcycle.cli.shared.options import card_options, common_options
from upcycle.cli.shared.output import print_facts, print_json


@click.command("card", short_help="Write a model card")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--name", help="the model's name on the card  [default: the folder's name]")
@card_options
@common_options
def command(out: Path, as_json: bool, debug: bool, **options: str | None) -> None:
    """Write a model card, README.md, into OUT, from what upcycle recorded and measured.

    Text that you add between the card's two marked lines is kept when the card is written again; everything else is
    overwritten. upcycle push writes the card, too.
    """
    from upcycle.publishing.model_card import write_card

    path = write_card(out, **options)
    if as_json:
        print_json({"card": str(path)})
    else:
        print_facts([("card", str(path)), ("next", f"upcycle push {out} YOU/{out.absolute().name} --dry-run")])
