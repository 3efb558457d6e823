"""Errors a user can meet, each with the exit code the command ends with.

A message says what is wrong with the value, the file and the key in it; the hint is the command or key that fixes it.
"""

from __future__ import annotations


class UpcycleError(Exception):
    """A failure that is explained to the user without a traceback (exit code 1)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(UpcycleError):
    """A checkpoint that cannot be read or holds what it must not hold (exit code 1)."""


class UsageError(UpcycleError):
    """An argument or recipe key that cannot be used (exit code 2)."""

    exit_code = 2


class RefusalError(UsageError):
    """A conversion that no target can hold exactly (exit code 2)."""


class VerificationError(UpcycleError):
    """A conversion that broke its promise (exit code 3)."""

    exit_code = 3


class EnvironmentFault(UpcycleError):  # noqa: N818 - EnvironmentError is a builtin
    """Disk, memory, permissions, network or a missing dependency (exit code 4)."""

    exit_code = 4
