"""``upcycle grow``: Branch-Train-Merge's rounds in one command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from upcycle.cli.shared.completion import recipe_names
from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json, print_message, print_table
from upcycle.cli.verbs.train import set_option
from upcycle.formatting import duration
from upcycle.trainers.distributed.signals import INTERRUPTED

if TYPE_CHECKING:
    from upcycle.branching.grow import RoundsResult


@click.command("grow", short_help="Branch a model, train each branch on its domain, merge, and again")
@click.argument("recipe", type=click.Path(path_type=Path), shell_complete=recipe_names("grow", files=True))
@click.option("--source", help="the seed, instead of the one in the recipe")
@click.option("--output", help="folder of all branches and merges, instead of the one in the recipe")
@set_option
@click.option("--nproc", type=click.IntRange(1), help="ranks on this machine that train each branch")
@click.option("--dry-run", is_flag=True, help="only print all steps, which are done, and what is next")
@click.option("--restart", is_flag=True, help="forget all steps that are done, and begin again")
@quiet_option
@common_options
def command(
    recipe: Path,
    source: str | None,
    output: str | None,
    set_: dict[str, Any],
    nproc: int | None,
    dry_run: bool,
    restart: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a forest of models, one per domain, in rounds (Branch-Train-Merge), as RECIPE says: a YAML file,
    or the name of a recipe that comes with upcycle (upcycle list recipes).

    In every round, each branch is trained on its domain; then all are merged, and the merge is what the next round's branches begin
    as. With branch: posteriors, each begins as the mean of the forest that suits its domain best, as in the paper. At the end, the
    forest may become one MoE (last), which is trained on all domains (tuning): Branch-Train-MiX.

    To continue after a signal or a kill, run the same command again. More rounds may be added to the recipe later.

    \b
    upcycle grow rounds.yaml --dry-run
    upcycle grow btm --source ./seed --output ./forest --set domains.law=law.jsonl --set domains.code=code.jsonl
    upcycle grow rounds.yaml --set training.stages.steps=500 --nproc 2
    """
    from upcycle.branching.grow import grow, look
    from upcycle.branching.rounds_recipe import read_rounds_recipe

    overrides = {**({"source": source} if source else {}), **({"output": output} if output else {}), **set_}
    parsed = read_rounds_recipe(recipe, overrides)
    if dry_run:
        result = look(parsed)
    else:
        said = (lambda _: None) if quiet else print_message
        result = grow(parsed, nproc=nproc, restart=restart, say=said, progress=ProgressBars(quiet))
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result, [domain.name for domain in parsed.domains])
    if result.stopped:
        sys.exit(INTERRUPTED)


def _show(result: RoundsResult, domains: list[str]) -> None:
    def cells(losses: dict[str, float] | None) -> list[str]:
        return [f"{losses[name]:.4f}" if losses and name in losses else "" for name in domains]

    rows = [["seed", "", "", *cells(result.seed)]]
    rows += [[each.step, each.does, each.state, *cells(each.losses)] for each in result.steps]
    print_table(["step", "what", "state", *domains], rows, right=range(3, 3 + len(domains)))
    left = [each.step for each in result.steps if each.state != "done"]
    if left:
        print_facts([("next", left[0]), ("left", f"{len(left)} of {len(result.steps)} steps")])
    else:
        print_facts(
            [
                ("losses", "nats per token of each domain's held-out text"),
                ("model", result.model or ""),
                ("time", duration(result.seconds)),
                ("next", f"upcycle evaluate {result.model}"),
            ]
        )
