"""Reads the calibration text of a recipe as windows of token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.progress import Progress
from upcycle.text.mixture import mixed_windows, read_texts

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.planning.job import PlannedJob


def calibration_windows(job: PlannedJob, checkpoint: Checkpoint, progress: Progress) -> torch.Tensor:
    """Return the calibration tokens of a conversion, int64 ids ``[N, W]``.

    Raises:
        UsageError: the recipe leaves no tokenizer, or a text cannot be read, has no such column, or is shorter than one window.
    """
    wanted = job.recipe.calibration
    if job.recipe.tokenizer == "none":
        raise UsageError("calibration reads text, and --tokenizer none leaves no tokenizer", hint="--tokenizer copy")
    window = min(wanted.window, job.context, wanted.tokens)
    windows = mixed_windows(read_texts(wanted), load_tokenizer(checkpoint.source.path), wanted.tokens, window)
    if windows.numel() < 0.9 * wanted.tokens:
        progress.note(
            f"calibrating on {windows.numel():,} tokens: the texts hold no more (asked for {wanted.tokens:,})"
        )
    return windows
