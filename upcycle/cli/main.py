"""The ``upcycle`` command: finds the verb, runs it, and turns a failure into one message and the documented exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from inspect import cleandoc

import click

from upcycle.cli.shared.grouped_help import examples_within
from upcycle.cli.shared.output import (
    flush_streams,
    prepare_streams,
    print_error,
    print_json_error,
    print_message,
    print_traceback,
)
from upcycle.cli.shared.usage_errors import usage_error
from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.hardware.child_processes import SAFE_PATH_VARIABLE
from upcycle.hardware.memory import is_out_of_memory
from upcycle.registry import did_you_mean
from upcycle.trainers.distributed.signals import INTERRUPTED, interrupting
from upcycle.trainers.distributed.told_once import first_to_tell
from upcycle.version import __version__

# What a verb is for -> the verb -> its module. Help shows the groups in this order.
VERB_GROUPS = {
    "Convert": {
        "init": "tools.init",
        "convert": "convert",
        "plan": "plan",
        "verify": "verify",
        "compare": "compare",
        "recipe": "tools.recipe",
    },
    "Compress": {
        "observe": "compressing.observe",
        "compress": "compressing.compress",
        "pack": "compressing.pack",
        "unpack": "compressing.unpack",
    },
    "Look": {
        "evaluate": "evaluate",
        "generate": "generate",
        "chat": "chat",
        "report": "report",
    },
    "Train": {
        "train": "train",
        "grow": "grow",
        "export": "export",
        "merge": "adapting.merge",
    },
    "Publish": {
        "card": "card",
        "push": "push",
    },
    "Tools": {
        "demo": "demo",
        "list": "tools.list_plugins",
        "completion": "tools.completion",
        "tune-kernels": "tools.tune_kernels",
        "env": "tools.env",
    },
}
VERBS = {name: module for group in VERB_GROUPS.values() for name, module in group.items()}
CONTINUABLE = (
    "convert",
    "compress",
    "train",
    "grow",
    "push",
)  # their work so far is kept, so the same command can continue it


class _Verbs(click.Group):
    """Finds the verbs, and imports a verb's module only when it is named (or when all are listed)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"upcycle.cli.verbs.{VERBS[cmd_name]}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb that the arguments begin with.

        Raises:
            UsageError: there is no such verb; the hint names the one that was probably meant.
        """
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            hint = f"{did_you_mean(args[0], VERBS)}all of them: upcycle --help"
            raise UsageError(f"no such command: {args[0]}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the text, with the examples as wide as the terminal."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(examples_within(cleandoc(self.help or ""), formatter.width - formatter.current_indent))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs, each below what it is for."""
        width = max(map(len, VERBS))
        for title, names in VERB_GROUPS.items():
            with formatter.section(title):
                found = [(name, self.get_command(ctx, name)) for name in names]
                formatter.write_dl(
                    [(name.ljust(width), command.get_short_help_str(300)) for name, command in found if command]
                )


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="upcycle")
def cli() -> None:
    """Turn a dense transformer checkpoint into a Mixture-of-Experts checkpoint, and verify the result.

    \b
    upcycle init                                       answer five questions, get a recipe
    upcycle demo                                       see it work in a minute
    upcycle plan SOURCE --experts 8                    see what a conversion would cost
    upcycle convert SOURCE OUT --experts 8 --top-k 2   convert and verify
    upcycle verify OUT                                 verify again
    upcycle push OUT YOU/NAME                          publish on the Hugging Face hub

    upcycle COMMAND --help says more of each.

    Exit codes: 0 ok, 1 failure, 2 usage or recipe, 3 verification failed, 4 environment, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code.

    Args:
        arguments: what stands behind ``upcycle``; default: that of this process.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    prepare_streams()
    os.environ.setdefault(SAFE_PATH_VARIABLE, "1")  # for processes that libraries start, such as compilers of kernels
    # Upcycle shows its own progress bars; the hub's would be drawn across them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    debug = "--debug" in arguments or bool(os.environ.get("UPCYCLE_DEBUG"))
    code = _run(arguments, debug)
    try:
        flush_streams()
    except UpcycleError as error:
        print_error(error)
        code = code or error.exit_code
    sys.exit(code)


def _run(arguments: list[str], debug: bool) -> int:
    """Run the verb, print what went wrong, and return the exit code."""
    try:
        # Clusters, launchers and terminals send any of several signals. From here on each of them ends a command as Ctrl-C
        # does, so that temporary files are removed and the user learns what can be continued.
        with interrupting():
            code = cli.main(arguments, prog_name="upcycle", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        continuable = arguments[:1] and arguments[0] in CONTINUABLE
        if os.environ.get("RANK", "0") == "0":
            print_message("")  # the terminal has left ^C on this line
            print_message("interrupted" + ("; run the same command again to continue" if continuable else ""))
        return INTERRUPTED
    except click.ClickException as error:
        return _failed(usage_error(error), arguments)
    except UpcycleError as error:
        if debug:
            print_traceback(error)
        return _failed(error, arguments)
    except BrokenPipeError:
        return 0  # the reader has closed the pipe (upcycle generate | head), which is no failure
    except Exception as error:
        if debug:
            print_traceback(error)
        return _failed(_unforeseen(error), arguments)


def _unforeseen(error: Exception) -> UpcycleError:
    """Return what to tell of an error that no module has explained."""
    said = str(error).strip()
    if is_out_of_memory(error):
        return EnvironmentFault(
            f"out of memory{': ' * bool(said)}{said.partition(chr(10))[0]}",
            hint="upcycle plan says what a conversion needs, upcycle plan train what a run does; what was stopped goes on by the same "
            "command where more memory is free",
        )
    hint = "this is a bug in upcycle: please report it, with the output of --debug and of upcycle env"
    return UpcycleError(f"{type(error).__name__}: {said}", hint=hint)


def _failed(error: UpcycleError, arguments: list[str]) -> int:
    """Print what went wrong, also as JSON if that was asked for, unless another rank has; and return the exit code."""
    if not first_to_tell(str(error)):
        return error.exit_code
    if "--json" in arguments:
        print_json_error(error)
    print_error(error)
    return error.exit_code


if __name__ == "__main__":
    main()
