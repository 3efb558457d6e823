"""The text that a result is verified on, as windows of token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from upcycle.calibration_text import text_names
from upcycle.errors import CheckpointError
from upcycle.stock import load_tokenizer
from upcycle.text import DEMO_TEXTS, demo_parts, encode, read_text, windows_of

if TYPE_CHECKING:
    from upcycle.checkpoint import Checkpoint
    from upcycle.planning import AnyJob

_WINDOW = 256


def token_windows(job: AnyJob, checkpoint: Checkpoint, text: str | None, tokens: int) -> tuple[torch.Tensor, str]:
    """Token ids ``[N, W]`` to measure on, and what they are from.

    Raises:
        UsageError: the text cannot be read, or is shorter than one window.
        CheckpointError: the tokenizer writes tokens that the model does not have.
    """
    window = min(_WINDOW, job.context, tokens)
    if job.recipe.tokenizer == "none":
        rng = torch.Generator().manual_seed(job.recipe.seed)
        ids = torch.randint(job.vocab_size, (max(1, tokens // window), window), generator=rng)
        return ids, "random token ids (no tokenizer)"
    tokenizer = load_tokenizer(checkpoint.source.path)
    if text:
        contents, label = [read_text(text)], text
    elif set(text_names(job.recipe.calibration.texts)) & set(DEMO_TEXTS):
        contents = [demo_parts(name)[1] for name in DEMO_TEXTS]
        label = "the quarter of the embedded texts that was not calibrated on"
    else:
        contents, label = [read_text(name) for name in DEMO_TEXTS], "embedded validation texts"
    ids = windows_of([encode(tokenizer, content) for content in contents], tokens, window)
    if int(ids.max()) >= job.vocab_size:
        raise CheckpointError(
            f"{checkpoint.source.path}: the tokenizer writes token {int(ids.max()):,}, and the model has {job.vocab_size:,}",
            hint="take the tokenizer that belongs to these weights",
        )
    return ids, label
