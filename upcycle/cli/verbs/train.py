"""``upcycle train``: continual pre-training of a converted model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import assigned, common_options, quiet_option
from upcycle.cli.shared.output import print_facts, print_json, say, warn
from upcycle.errors import UsageError
from upcycle.formatting import duration
from upcycle.trainers.distributed.signals import INTERRUPTED


def assignments(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Any]:
    """Read ``--set KEY=VALUE``, values as YAML.

    Raises:
        UsageError: one is not of that form.
    """
    found = {}
    for assignment in values:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise UsageError(f"--set takes KEY=VALUE, got '{assignment}'", hint="--set zero.stage=2")
        found[name] = assigned(assignment, value)
    return found


set_option = click.option(
    "--set",
    "set_",
    multiple=True,
    metavar="KEY=VALUE",
    callback=assignments,
    help="set any recipe key, e.g. zero.stage=2, stages.train.steps=9 (a stage by its name or number; repeatable)",
)


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", help="the model, instead of the recipe's")
@click.option("--output", help="the run's folder, instead of the recipe's")
@set_option
@click.option("--nproc", type=click.IntRange(1), help="ranks on this machine (or, with --hostfile, on each)")
@click.option(
    "--hostfile", type=click.Path(path_type=Path), help="machines of the run (NAME slots=RANKS a line), reached by ssh"
)
@click.option("--restart", is_flag=True, help="throw the run's checkpoints away and begin anew")
@quiet_option
@common_options
def command(
    recipe: Path,
    model: str | None,
    output: str | None,
    set_: dict[str, Any],
    nproc: int | None,
    hostfile: Path | None,
    restart: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a model as RECIPE says, on one rank or many.

    RECIPE is a YAML file, or the name of a recipe that comes with upcycle (upcycle list recipes).

    A run that was stopped continues from its newest checkpoint when the same command is given again, on any number of
    ranks. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 finish the step, save, and exit with 130; a second one ends it at once.
    Started by torchrun, the command is one of its ranks.

    \b
    upcycle train heal_split --model ./half --output ./healed --set data=corpus.jsonl
    upcycle train recipe.yaml --nproc 8 --set zero.stage=2
    upcycle train recipe.yaml --hostfile hosts --set expert_parallel=8
    """
    from upcycle.trainers.recipe.training_recipe import read_train_recipe

    overlaid = {**({"model": model} if model else {}), **({"output": output} if output else {}), **set_}
    told = read_train_recipe(recipe, overlaid)
    arguments = _without(sys.argv[1:], ("--nproc", "--hostfile"))
    if (nproc or hostfile) and _starts_ranks(nproc, hostfile):
        from upcycle.trainers.distributed.launcher import COMMAND, launch, told_command

        os.environ[COMMAND] = told_command(sys.argv[1:])
        if hostfile:
            from upcycle.trainers.distributed.hosts import launch_hosts

            code = launch_hosts(arguments, hostfile, nproc)
        else:
            code = launch(arguments, nproc or 1)
        if code:
            sys.exit(code)
        return
    from upcycle.trainers.distributed.ranks import first_rank
    from upcycle.trainers.run.loop import train

    result = train(told, (lambda _: None) if quiet else say, restart)
    if first_rank():
        if as_json:
            print_json(result.as_dict())
        else:
            print_facts(_facts(result))
    if result.stopped:
        sys.exit(INTERRUPTED)


def _starts_ranks(nproc: int | None, hostfile: Path | None) -> bool:
    """Whether this command is to start ranks: not where it was started as one of several.

    Raises:
        UsageError: it was.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        if "RANK" in os.environ:
            warn("RANK and WORLD_SIZE=1 in the environment are not used: ranks are started as the options say")
        return True
    option = f"--nproc {nproc}" if hostfile is None else f"--hostfile {hostfile}"
    raise UsageError(
        f"{option} starts ranks, but WORLD_SIZE={world} and RANK={os.environ.get('RANK')} say that this process is one of several",
        hint=f"leave {option} out where torchrun or a cluster starts the ranks, or unset RANK and WORLD_SIZE",
    )


def _without(arguments: list[str], options: tuple[str, ...]) -> list[str]:
    """Arguments for each rank: what starts the ranks is left out."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in options)):
            kept.append(argument)
    return kept


def _facts(result: Any) -> list[tuple[str, str]]:
    validation = ", ".join(f"{name} {nats:.4f}" for name, nats in result.validation.items())
    facts = [
        (
            "trained",
            f"{result.step:,} steps, {result.tokens:,} tokens" + (", stopped by a signal" if result.stopped else ""),
        ),
        ("loss", f"{result.loss:.4f}" + (f"; held out: {validation}" if validation else "")),
        ("time", duration(result.seconds)),
        ("checkpoint", result.checkpoint),
    ]
    if result.model:
        facts += [("model", result.model), ("next", f"upcycle evaluate {result.model}")]
    else:
        facts.append(
            ("next", f"{_again()}   continues" if result.stopped else f"upcycle export {result.checkpoint} OUT")
        )
    return facts


def _again() -> str:
    """The command that continues this run."""
    from upcycle.trainers.distributed.launcher import COMMAND, told_command

    own = os.environ.get(COMMAND) or told_command(sys.argv[1:])
    return f"torchrun ... {own}" if "TORCHELASTIC_RUN_ID" in os.environ and COMMAND not in os.environ else own
