"""``upcycle compress``: makes a Mixture-of-Experts smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.grouped_help import GroupedCommand
from upcycle.cli.shared.options import build_recipe, common_options, quiet_option, some_recipe_options
from upcycle.cli.shared.output import note
from upcycle.errors import UsageError

DEFAULT_METHOD = "naee"
ROUNDING_ALONE = "quantize"  # the method where only --bits is given
KEYS = (
    *(
        "method",
        "keep",
        "width",
        "target",
        "observations",
        "precision.bits",
        "precision.attention_bits",
        "precision.rounding",
        "precision.allocation",
        "calibration.text",
        "calibration.tokens",
        "refit",
        "reconstruction.passes",
        "dtype",
        "max_shard_size",
    ),
    *("tokenizer", "seed", "revision", "verification.text", "verification.tokens"),
)


@click.command("compress", cls=GroupedCommand, short_help="Make a MoE smaller: fewer experts, refitted, and verify it")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@some_recipe_options(*KEYS)
@click.option("--no-verify", is_flag=True, help="skip the comparison with the MoE as it was")
@click.option("--overwrite", is_flag=True, help="replace an OUT that upcycle wrote, once the new model is complete")
@click.option("--restart", is_flag=True, help="discard an unfinished conversion of another recipe in OUT")
@click.option("--dry-run", is_flag=True, help="only print what it would cost, like upcycle plan")
@quiet_option
@common_options
def command(
    source: str,
    out: Path,
    no_verify: bool,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Leave out or merge experts of the Mixture-of-Experts SOURCE, or round them to few bits, write the smaller model into OUT, and
    verify it.

    SOURCE is a local folder, a hub id or a recipe (.yaml). The experts that are left are refitted in closed form towards the layer
    that they came from, on the calibration text. To continue a run that was stopped, run the same command again.

    \b
    upcycle compress ./moe OUT --keep 0.75 --calibration docs.txt,code.txt
    upcycle compress ./moe OUT --keep 0.5 --method naee --calibration docs.txt
    upcycle compress ./moe OUT --keep 0.75 --observations seen.safetensors --refit none
    upcycle compress ./moe OUT --bits 4 --calibration docs.txt,code.txt
    """
    from upcycle.cli.verbs.convert import carry_out
    from upcycle.registry import load

    rounds = flags["precision__bits"] is not None and flags["keep"] is None and flags["width"] is None
    base = {"method": ROUNDING_ALONE if rounds else DEFAULT_METHOD}
    recipe = build_recipe(source, flags, base, None if quiet else note)
    if load("method", recipe.method).kind not in ("compression", "narrowing"):
        raise UsageError(
            f"{recipe.method} does not compress a model",
            hint=f"upcycle convert {source} OUT --method {recipe.method}, or --method {DEFAULT_METHOD}",
        )
    carry_out(recipe, out, no_verify, overwrite, restart, None, dry_run, quiet, as_json)
