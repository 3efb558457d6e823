"""The ``upcycle`` command: finds the verb, runs it, turns failures into one message and the documented exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from upcycle.cli.shared.output import flush_streams, prepare_streams, print_error, print_traceback, say
from upcycle.errors import UpcycleError, UsageError
from upcycle.hardware.child_processes import VARIABLE
from upcycle.trainers.distributed.signals import INTERRUPTED, interrupting
from upcycle.version import __version__

VERBS = {
    "convert": "convert",
    "plan": "plan",
    "verify": "verify",
    "evaluate": "evaluate",
    "compare": "compare",
    "train": "train",
    "export": "export",
    "generate": "generate",
    "chat": "chat",
    "report": "report",
    "card": "card",
    "push": "push",
    "list": "list_plugins",
    "demo": "demo",
    "tune-kernels": "tune_kernels",
    "env": "env",
}
CONTINUED = ("convert", "train", "push")  # what a stopped one did is kept


class _Verbs(click.Group):
    """Imports a verb's module only when it is named (or when all are listed)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"upcycle.cli.verbs.{VERBS[cmd_name]}").command
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="upcycle")
def cli() -> None:
    """Turn a dense transformer checkpoint into a Mixture-of-Experts one that is proven right.

    \b
    upcycle demo                                       see it work in a minute
    upcycle plan SOURCE --experts 8                    what a conversion would cost
    upcycle convert SOURCE OUT --experts 8 --top-k 2   convert and verify
    upcycle verify OUT                                 prove it again
    upcycle push OUT YOU/NAME                          publish it

    Exit codes: 0 ok, 1 failure, 2 usage or recipe, 3 verification failed, 4 environment, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    os.environ.setdefault(VARIABLE, "1")  # for what libraries start, such as compilers of kernels
    # Progress is ours to show.
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
    """The exit code; what went wrong has been said."""
    try:
        # Clusters, launchers and terminals send any of several signals: each of them ends a command as Ctrl-C does, from the
        # first moment on, so that temporary files go and what can be continued says so.
        with interrupting():
            code = cli.main(arguments, prog_name="upcycle", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        goes_on = arguments[:1] and arguments[0] in CONTINUED
        if os.environ.get("RANK", "0") == "0":
            say("")  # behind the terminal's own ^C
            say("interrupted" + ("; the same command continues where it stopped" if goes_on else ""))
        return INTERRUPTED
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        print_error(UsageError(error.format_message(), hint=f"{context.command_path} --help" if context else None))
        return error.exit_code
    except UpcycleError as error:
        if debug:
            print_traceback(error)
        print_error(error)
        return error.exit_code
    except BrokenPipeError:
        return 0  # the reader has gone (upcycle generate | head): nothing to tell it
    except Exception as error:
        if debug:
            print_traceback(error)
        name = type(error).__name__
        print_error(
            UpcycleError(f"{name}: {error}", hint="this is a fault in upcycle: report it with --debug and upcycle env")
        )
        return 1


if __name__ == "__main__":
    main()
