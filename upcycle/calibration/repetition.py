"""Finds text that repeats itself, which a model writes when its sampling collapses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from upcycle.errors import UsageError
from upcycle.progress import Progress

_RUN = 4  # tokens
# Shares of different runs of 4 tokens. In windows of 512 tokens of documentation, code, docstrings and news they are 0.47 to 1,
# and 0.88 and more in half of them; what SmolLM2-135M writes has 0.79 to 1; a loop of k tokens has k / 509.
LEAST_DISTINCT = 0.4  # of a window; with less, it says little that it has not said before
_LEAST_OVERALL = 0.25  # of all windows together; with less, they say the same
_WORTH_A_WARNING, _TOO_MANY = 0.1, 0.9  # shares of windows


@dataclass(frozen=True)
class Repetition:
    """Says how much windows of tokens repeat themselves.

    Attributes:
        windows: how many there are.
        collapsed: how many of them repeat themselves.
        distinct: the share of different runs of four tokens among those of all windows.
    """

    windows: int
    collapsed: int
    distinct: float


def repetition(windows: torch.Tensor) -> Repetition:
    """Count different runs of four tokens in each window, and in all.

    Args:
        windows: token ids, int64 ``[N, W]``.
    """
    length = min(_RUN, windows.shape[1])
    runs = windows.unfold(1, length, 1)
    # Runs are told apart by a hash of 64 bits, which wraps; two different ones of a few million rarely have the same.
    factors = torch.tensor([0x9E3779B97F4A7C1 ** (i + 1) % (1 << 62) | 1 for i in range(length)])
    keys = (runs * factors).sum(-1)
    ordered = keys.sort(dim=1).values
    shares = (1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)) / ordered.shape[1]
    return Repetition(len(windows), int((shares < LEAST_DISTINCT).sum()), len(keys.unique()) / keys.numel())


def judge(found: Repetition, progress: Progress) -> None:
    """Warn of text that repeats itself, and refuse it where almost all of it does.

    Raises:
        UsageError: a calibration on this text would say nothing about any other.
    """
    hint = "give a text file: --calibration FILE, or self,FILE"
    if found.collapsed > _TOO_MANY * found.windows:
        raise UsageError(
            f"the model cannot write its own calibration text: {found.collapsed} of {found.windows} windows repeat the "
            f"same few words (under {LEAST_DISTINCT:.0%} of their runs of {_RUN} tokens differ)",
            hint=hint,
        )
    if found.distinct < _LEAST_OVERALL:
        raise UsageError(
            f"the model cannot write its own calibration text: it writes the same in all {found.windows} windows "
            f"({found.distinct:.0%} of their runs of {_RUN} tokens differ)",
            hint=hint,
        )
    if found.collapsed > _WORTH_A_WARNING * found.windows:
        progress.note(
            f"{found.collapsed} of {found.windows} windows that the model wrote repeat themselves, and say little about other "
            f"text; {hint}"
        )
