"""``upcycle init``: asks what somebody wants, and writes the recipe of a first conversion."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import note, print_facts, print_json, print_line, print_message, warn
from upcycle.errors import UsageError
from upcycle.files.atomic_files import write_whole
from upcycle.files.formats.parsing import parse_yaml
from upcycle.files.output.ownership import cannot_write
from upcycle.files.user_paths import user_path

# As upcycle.planning.drafting.first_recipe has them, which is not loaded for help.
_GOALS = ("speed", "capacity")
_RUNNERS = ("transformers", "vllm", "llama.cpp")
_QUESTIONS = {
    "model": "the model: a folder, a hub id (org/name), a .gguf file, or demo",
    "goal": "more speed (fewer neurons per token), or more capacity (more experts)",
    "text": "text like what it will read: files, separated by commas; none: the model writes its own",
    "train": "will you train it afterwards",
    "engine": "where it will run",
}


@click.command("init", short_help="Answer five questions, get a recipe")
@click.argument("out", type=click.Path(path_type=Path), default=Path("upcycle.yaml"), required=False)
@click.option("--model", metavar="SOURCE", help=_QUESTIONS["model"])
@click.option("--goal", type=click.Choice(_GOALS), help=_QUESTIONS["goal"])
@click.option("--text", metavar="FILE[,FILE]", help=_QUESTIONS["text"])
@click.option("--train/--no-train", default=None, help=_QUESTIONS["train"])
@click.option("--engine", type=click.Choice(_RUNNERS), help=_QUESTIONS["engine"])
@common_options
def command(
    out: Path,
    model: str | None,
    goal: str | None,
    text: str | None,
    train: bool | None,
    engine: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Ask what the first conversion is for, print what it would cost, and write its recipe into OUT (default: upcycle.yaml).

    An option answers its question beforehand. Without a terminal nothing can be asked: then give --model, at least; the other
    answers are speed, no text, no training and transformers unless an option says otherwise.

    \b
    upcycle init
    upcycle init first.yaml --model ./llama --goal speed --text docs.txt,code.txt
    """
    path = user_path(out)
    if path.exists():
        raise UsageError(
            f"{out} is there already, and may have been changed", hint="another name: upcycle init mine.yaml"
        )
    given = {"model": model, "goal": goal, "text": text, "train": train, "engine": engine}
    answers = _answers(given, asks=has_terminal() and not as_json)
    drafted, plan, context = _drafted(answers)
    from upcycle.planning.drafting.first_recipe import commands

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: temporary.write_text(drafted.text, encoding="utf-8"))
    except OSError as error:
        raise cannot_write(path, error) from None
    following = commands(answers, str(out), context)
    if as_json:
        told = {"out": str(out), "recipe": parse_yaml(drafted.text, str(out), error=UsageError)}
        print_json({**told, "remarks": list(drafted.remarks), "commands": following, "plan": plan.as_dict()})
        return
    from upcycle.cli.verbs.plan import plan_facts

    print_facts([*plan_facts(plan), ("recipe", f"{out}, from {drafted.taken_from}")])
    for warning in plan.warnings:
        warn(warning)
    for remark in drafted.remarks:
        note(remark)
    print_line()
    for number, line in enumerate(following):
        print_line("next  " if not number else "then  ", line, wrap=False)


def _answers(given: dict[str, Any], asks: bool) -> Any:
    """Return all answers: those that options gave, and of the others what is typed, or the usual.

    Raises:
        UsageError: the model was not named, and there is no terminal to ask on.
    """
    from upcycle.planning.drafting.first_recipe import Answers

    if not asks and not given["model"]:
        raise UsageError(
            "there is no terminal to ask on, and --model is missing",
            hint="upcycle init --model SOURCE --goal speed --text FILE,FILE --no-train --engine transformers",
        )
    missing = [name for name, value in given.items() if value is None] if asks else []
    for number, name in enumerate(missing, 1):
        given[name] = _asked(f"{number}/{len(missing)} {_QUESTIONS[name]}", name)
    return Answers(
        model=given["model"],
        goal=given["goal"] or "speed",
        texts=tuple(one.strip() for one in (given["text"] or "").split(",") if one.strip()),
        train=bool(given["train"]),
        engine=given["engine"] or "transformers",
    )


def has_terminal() -> bool:
    """Return whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _asked(question: str, name: str) -> Any:
    if name == "train":
        return click.confirm(question, default=False, err=True)
    choices = {"goal": _GOALS, "engine": _RUNNERS}.get(name)
    default = {"model": "demo", "text": ""}.get(name, choices[0] if choices else None)
    kind = click.Choice(choices) if choices else None
    return click.prompt(question, default=default, type=kind, show_default=name != "text", err=True)


def _drafted(answers: Any) -> tuple[Any, Any, int | None]:
    """Return the draft, its plan, and the most positions of the model.

    Raises:
        UsageError: a text is missing, or the model cannot be converted like that.
    """
    from dataclasses import replace

    from upcycle.architectures.usual_keys import usual_keys
    from upcycle.conversion.jobs import job_of
    from upcycle.planning.drafting.first_recipe import draft, is_faster, recipes_for
    from upcycle.recipe.conversion_recipe import parse_recipe
    from upcycle.registry import find

    for text in answers.texts:
        if not user_path(text).exists() and "/" not in text:
            raise UsageError(
                f"no such text file: {text}", hint="a UTF-8 file, rows (.jsonl, .csv, .parquet), or a hub dataset"
            )

    def planned(drafted: Any) -> tuple[Any, int | None]:
        job = job_of(parse_recipe(parse_yaml(drafted.text, "the draft", error=UsageError), "the draft"))
        return job.cost(), usual_keys(job.config).get("max_position_embeddings")

    for name in recipes_for(answers):
        drafted = draft(answers, name, ())
        print_message(f"planning {answers.model} by {name} ...")
        found, context = planned(drafted)
        family = find("family", found.family)
        fitted = draft(answers, name, family.targets if family else ())
        if fitted.text != drafted.text:
            found, context = planned(fitted)
        drafted = fitted
        if answers.goal == "capacity" or is_faster(found):
            return drafted, found, context
    slow = (
        "no split is predicted to be faster than this model here: measure with upcycle compare, or convert a larger one"
    )
    return replace(drafted, remarks=(*drafted.remarks, slow)), found, context
