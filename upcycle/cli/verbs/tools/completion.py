"""``upcycle completion``: prints what makes a shell complete verbs, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_json, print_markdown
from upcycle.errors import EnvironmentFault

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print what makes a shell complete names")
@click.argument("shell", type=click.Choice(SHELLS))
@common_options
def command(shell: str, as_json: bool, debug: bool) -> None:
    """Print a script that makes SHELL complete verbs, options, and the names of methods, routers, targets and recipes.

    \b
    upcycle completion bash > ~/.local/share/bash-completion/completions/upcycle
    upcycle completion zsh > "${fpath[1]}/_upcycle"
    upcycle completion fish > ~/.config/fish/completions/upcycle.fish

    Then open a new shell.
    """
    from upcycle.cli.main import cli

    script = get_completion_class(shell)
    if script is None:
        raise EnvironmentFault(f"this release of click knows no completion for {shell}", hint="pip install -U click")
    text = script(cli, {}, "upcycle", "_UPCYCLE_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "script": text})
        return
    print_markdown(text)
