"""Defines the errors that a user can meet, each with the exit code of the command.

A message says what is wrong and names the value, the file and the key; the hint names the command or key that fixes it.
"""

from __future__ import annotations


class UpcycleError(Exception):
    """A failure that the user sees as a message and a hint, without a traceback (exit code 1)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the message and the hint, as a traceback or a notebook shows them."""
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class CheckpointError(UpcycleError):
    """A checkpoint that cannot be read, or whose content is damaged or wrong (exit code 1)."""


class UsageError(UpcycleError):
    """An argument or recipe key that cannot be used (exit code 2)."""

    exit_code = 2


class RefusalError(UsageError):
    """A conversion that no target can hold exactly (exit code 2)."""


class VerificationError(UpcycleError):
    """A conversion that did not keep its promise (exit code 3)."""

    exit_code = 3


class EnvironmentFault(UpcycleError):  # noqa: N818 - EnvironmentError is a builtin
    """Disk, memory, permissions, network or a missing dependency (exit code 4)."""

    exit_code = 4
