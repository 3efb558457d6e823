"""The ``upcycle`` command: finds the verb, runs it, and turns a failure into one message and the documented exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from upcycle.cli.shared.output import flush_streams, prepare_streams, print_error, print_message, print_traceback
from upcycle.errors import UpcycleError, UsageError
from upcycle.hardware.child_processes import SAFE_PATH_VARIABLE
from upcycle.trainers.distributed.signals import INTERRUPTED, interrupting
from upcycle.version import __version__

VERBS = {
    "convert": "convert",
    "plan": "plan",
    "verify": "verify",
    "evaluate": "evaluate",
    "compare": "compare",
    "observe": "compressing.observe",
    "compress": "compressing.compress",
    "pack": "compressing.pack",
    "unpack": "compressing.unpack",
    "train": "train",
    "export": "export",
    "merge": "adapting.merge",
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
CONTINUABLE = ("convert", "compress", "train", "push")  # their work so far is kept, so the same command can continue it


class _Verbs(click.Group):
    """Finds the verbs, and imports a verb's module only when it is named (or when all are listed)."""

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
    """Turn a dense transformer checkpoint into a Mixture-of-Experts checkpoint, and verify the result.

    \b
    upcycle demo                                       see it work in a minute
    upcycle plan SOURCE --experts 8                    see what a conversion would cost
    upcycle convert SOURCE OUT --experts 8 --top-k 2   convert and verify
    upcycle verify OUT                                 verify again
    upcycle push OUT YOU/NAME                          publish on the Hugging Face hub

    Exit codes: 0 ok, 1 failure, 2 usage or recipe, 3 verification failed, 4 environment, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code.

    Args:
        arguments: what stands behind ``upcycle``; default: that of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
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
        context = getattr(error, "ctx", None)
        print_error(UsageError(error.format_message(), hint=f"{context.command_path} --help" if context else None))
        return error.exit_code
    except UpcycleError as error:
        if debug:
            print_traceback(error)
        print_error(error)
        return error.exit_code
    except BrokenPipeError:
        return 0  # the reader has closed the pipe (upcycle generate | head), which is no failure
    except Exception as error:
        if debug:
            print_traceback(error)
        name = type(error).__name__
        print_error(
            UpcycleError(
                f"{name}: {error}",
                hint="this is a bug in upcycle: please report it, with the output of --debug and of upcycle env",
            )
        )
        return 1


if __name__ == "__main__":
    main()
