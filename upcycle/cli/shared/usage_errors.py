"""What click says of a wrong command line, in the words of all other errors: what was found, and what to type instead."""

from __future__ import annotations

import click

from upcycle.errors import UsageError


def usage_error(error: click.ClickException) -> UsageError:
    """Return click's error as one of upcycle's; the hint names the option that was probably meant, and the verb's help."""
    context = getattr(error, "ctx", None)
    help_of = f"{context.command_path} --help" if context else "upcycle --help"
    if isinstance(error, click.NoSuchOption):
        near = error.possibilities or ()
        meant = f"did you mean {' or '.join(sorted(near))}? " if near else ""
        return UsageError(f"no such option: {error.option_name}", hint=f"{meant}all of them: {help_of}")
    message = error.format_message().strip()
    words = message.removesuffix(".")
    return UsageError(words[:1].lower() + words[1:], hint=help_of)
