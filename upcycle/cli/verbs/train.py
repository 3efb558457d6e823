"""``upcycle train``: trains a model, usually to heal a conversion by continual pre-training."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from upcycle.cli.shared.completion import recipe_names
from upcycle.cli.shared.options import assigned, common_options, quiet_option
from upcycle.cli.shared.output import print_facts, print_json, print_message, warn
from upcycle.errors import UsageError
from upcycle.files.locate_adapted import is_adapter
from upcycle.formatting import duration
from upcycle.trainers.distributed.signals import INTERRUPTED

if TYPE_CHECKING:
    from upcycle.trainers.recipe.training_recipe import TrainRecipe


def assignments(_: Any, __: Any, values: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys and values of ``--set KEY=VALUE`` options; values are read as YAML.

    Raises:
        UsageError: an option is not of that form, or its value is not YAML.
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
    help="set any recipe key, e.g. zero.stage=2, or stages.train.steps=9 (stages by name or number) (repeatable)",
)


@click.command("train", short_help="Train a model, on one rank or many")
@click.argument("recipe", type=click.Path(path_type=Path), shell_complete=recipe_names("train", files=True))
@click.option("--model", help="train this model instead of the one in the recipe")
@click.option("--output", help="folder of the run, instead of the one in the recipe")
@set_option
@click.option("--nproc", type=click.IntRange(1), help="ranks on this machine (or, with --hostfile, on each)")
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="file with the machines of the run, reached by ssh: a line NAME slots=RANKS each",
)
@click.option("--restart", is_flag=True, help="discard the run's checkpoints and begin again")
@click.option(
    "--show",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="check the data, print the first N rows as they are trained on, and stop before training",
)
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
    show: int | None,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a model as RECIPE says, on one rank or many.

    RECIPE is a YAML file, or the name of a recipe that comes with upcycle (upcycle list recipes).

    On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 the run finishes its step, saves a checkpoint, and exits with 130; a second signal
    ends it at once. To continue, run the same command again: it starts from the newest checkpoint, on any number of ranks.
    torchrun can start it, too; then every process is one rank.

    \b
    upcycle train heal_split --model ./half --output ./healed --set data=corpus.jsonl
    upcycle train instruct --model ./moe --output ./tuned --set data=chat.jsonl --show 3
    upcycle train recipe.yaml --nproc 8 --set zero.stage=2
    upcycle train recipe.yaml --hostfile hosts --set expert_parallel=8
    """
    from upcycle.trainers.recipe.training_recipe import read_train_recipe

    overrides = {**({"model": model} if model else {}), **({"output": output} if output else {}), **set_}
    parsed = read_train_recipe(recipe, overrides)
    if show:
        _show(parsed, show, quiet, as_json)
        return
    arguments = _without(sys.argv[1:], ("--nproc", "--hostfile"))
    if (nproc or hostfile) and _starts_ranks(nproc, hostfile):
        from upcycle.trainers.distributed.launcher import COMMAND, command_to_repeat, launch_ranks

        os.environ[COMMAND] = command_to_repeat(sys.argv[1:])
        if hostfile:
            from upcycle.trainers.distributed.hosts import launch_hosts

            code = launch_hosts(arguments, hostfile, nproc)
        else:
            code = launch_ranks(arguments, nproc or 1)
        if code:
            sys.exit(code)
        return
    from upcycle.trainers.distributed.ranks import first_rank
    from upcycle.trainers.run.loop import train

    result = train(parsed, (lambda _: None) if quiet else print_message, restart)
    if first_rank():
        if as_json:
            print_json(result.as_dict())
        else:
            print_facts(_facts(result))
    if result.stopped:
        sys.exit(INTERRUPTED)


def _show(recipe: TrainRecipe, count: int, quiet: bool, as_json: bool) -> None:
    from upcycle.cli.shared.training_rows import print_training_rows
    from upcycle.trainers.run.shown_rows import shown_rows

    rows = shown_rows(recipe, count, (lambda _: None) if quiet else print_message)
    if as_json:
        print_json({"rows": [row.as_dict() for row in rows]})
    else:
        print_training_rows(rows)


def _starts_ranks(nproc: int | None, hostfile: Path | None) -> bool:
    """Return True, unless this process was itself started as one of several ranks.

    Raises:
        UsageError: it was started as one of several ranks.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        if "RANK" in os.environ:
            warn("RANK and WORLD_SIZE=1 in the environment are ignored: the options say which ranks are started")
        return True
    option = f"--nproc {nproc}" if hostfile is None else f"--hostfile {hostfile}"
    raise UsageError(
        f"{option} starts ranks, but WORLD_SIZE={world} and RANK={os.environ.get('RANK')} say that this process is one of several",
        hint=f"leave {option} out if torchrun or a cluster starts the ranks, or unset RANK and WORLD_SIZE",
    )


def _without(arguments: list[str], options: tuple[str, ...]) -> list[str]:
    """Return the arguments for each rank: those of this command without ``options`` and their values."""
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
        adapted = is_adapter(Path(result.model))
        following = f"upcycle merge {result.model} OUT" if adapted else f"upcycle evaluate {result.model}"
        facts += [("adapter" if adapted else "model", result.model), ("next", following)]
    elif result.stopped:
        facts.append(("to continue", _again()))
    else:
        facts.append(("next", f"upcycle export {result.checkpoint} OUT"))
    return facts


def _again() -> str:
    """Return the command that continues this run."""
    from upcycle.trainers.distributed.launcher import COMMAND, command_to_repeat

    # A launcher hands its own command to the ranks; torchrun does not, so of its command only the end is known.
    command = os.environ.get(COMMAND) or command_to_repeat(sys.argv[1:])
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ and COMMAND not in os.environ
    return f"torchrun ... {command}" if torchrun else command
