"""``upcycle observe``: one pass over text that every way of compressing a MoE reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import Cell, ProgressBars, print_facts, print_json
from upcycle.formatting import size


@click.command("observe", short_help="Observe the experts of a MoE on text, to compress it")
@click.argument("moe")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--calibration", "text", required=True, help="the text: demo, files, a hub dataset, or self; comma between several"
)
@click.option("--calibration-tokens", "tokens", type=int, default=32768, help="tokens of it  [default: 32768]")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
    default="keep",
    help="dtype to round weights to",
)
@click.option("--revision", help="branch, tag or commit of a hub id")
@click.option("--overwrite", is_flag=True, help="replace a file OUT of observations")
@quiet_option
@common_options
def command(
    moe: str,
    out: Path,
    text: str,
    tokens: int,
    dtype: str,
    revision: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Observe the experts of MOE on text, and write what was seen into the file OUT.

    upcycle compress reads it with --observations: one pass over the text serves every method and every size. One layer is in memory
    at a time.

    \b
    upcycle observe ./moe seen.safetensors --calibration docs.txt
    upcycle compress ./moe OUT --method reap --keep 0.75 --observations seen.safetensors --refit none
    """
    from upcycle.calibration.compressing.observe_file import observe

    seen = observe(moe, out, text, tokens, dtype, revision, overwrite, ProgressBars(quiet))
    if as_json:
        print_json(seen)
        return
    facts: list[tuple[str, Cell]] = [
        ("output", f"{out} ({size(out.stat().st_size)})"),
        (
            "experts",
            f"{seen['experts']} in {len(seen['layers'])} layers, top-{seen['top_k']}, on {seen['tokens']:,} tokens",
        ),
        ("never chosen", _unused(seen)),
        ("next", f"upcycle compress {moe} OUT --method reap --keep 0.75 --observations {out} --calibration {text}"),
    ]
    print_facts(facts)


def _unused(seen: dict[str, Any]) -> str:
    unused = sum(layer["unused"] for layer in seen["layers"])
    few = sum(layer["few"] for layer in seen["layers"])
    return f"{unused} experts; {few} saw fewer than 32 tokens"
