"""The reference page of all commands, in Markdown: ``docs/reference/commands.md``."""

from __future__ import annotations

import inspect

import click

from upcycle.cli.main import VERBS, cli
from upcycle.cli.shared.plugin_tables import markdown_table
from upcycle.cli.verbs.plan_run import command as plan_run
from upcycle.cli.verbs.plan_train import command as plan_train

INNER = {"plan": {"train": plan_train, "run": plan_run}}
TITLE = """# Commands

`upcycle COMMAND --help` says the same. `--json` prints the result for programs ([its keys](json.md)), `--debug` shows tracebacks.
Results go to stdout, everything else to stderr. `NO_COLOR`, `HF_HOME`, `HF_HUB_OFFLINE` and the other variables of the Hugging Face
libraries are honoured; `UPCYCLE_DEBUG=1` is `--debug`. How commands end: [exit codes](exit_codes.md)."""


def commands_page() -> str:
    """Return the page of all commands: a table, then a section each, with its help and a table of its options."""
    sections = [TITLE, _overview()]
    context = click.Context(cli, info_name="upcycle")
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        verb_context = click.Context(command, info_name=verb, parent=context)
        sections += _command(command, verb_context)
        for name, inner in INNER.get(verb, {}).items():
            sections += _command(inner, click.Context(inner, info_name=f"{verb} {name}", parent=context))
    return "\n\n".join(sections)


def _overview() -> str:
    """Return a row per verb: its name, linked to its section, and its help in one line."""
    rows = []
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        rows.append([f"[`upcycle {verb}`](#upcycle-{verb})", command.get_short_help_str(200)])
    return markdown_table(["command", "what it does"], rows)


def _command(command: click.Command, context: click.Context) -> list[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    sections = [f"## {context.command_path}", f"`{usage}`", _text(command.help or "")]
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]  # without --help
    rows = [_option(option, context) for option in options]
    sections.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    return sections


def _text(text: str) -> str:
    """Click's help: ``\\b`` begins a paragraph whose lines stay as they are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        "```\n" + part.removeprefix("\b\n") + "\n```" if part.startswith("\b") else part for part in paragraphs
    )


def _option(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None
    names, meaning = (" ".join(part.split()).replace("|", r"\|") for part in record)
    return f"| `{names}` | {meaning} |"
