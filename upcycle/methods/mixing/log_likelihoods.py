"""Measures how likely a text is to a dense model, token by token."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import log_softmax

from upcycle.errors import CheckpointError
from upcycle.hardware.memory import available_memory
from upcycle.models.stock_model import source_model
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint

_LOGIT_BYTES = 1 << 26  # of fp64 logits


def log_likelihoods(checkpoint: DenseCheckpoint, windows: torch.Tensor, dtype: str, progress: Progress) -> torch.Tensor:
    """Return ``ln p(x_t | x_<t)``, fp64 ``[N, W - 1]``, for the token ids ``windows`` ``[N, W]`` but the first of each window.

    The weights are rounded to ``dtype`` first; the model runs in fp32, the softmax in fp64. The model is in memory as a whole,
    or where it does not fit, one layer at a time.

    Raises:
        CheckpointError: a logarithm is not finite.
    """
    elements = sum(spec.elements for spec in checkpoint.store.specs.values())
    streamed = 4 * elements > 0.6 * available_memory()
    model = source_model(checkpoint, dtype, streamed)
    # A streamed model reads every weight once per batch, so that larger batches are worth their memory.
    step = max(1, _LOGIT_BYTES * (8 if streamed else 1) // (8 * windows.shape[1] * checkpoint.config.vocab_size))
    batches, found = windows.split(step), []
    with progress.phase(f"scoring {checkpoint.source.name}", len(batches)):
        for batch in batches:
            logs = log_softmax(model.logits(batch)[:, :-1].double(), dim=-1)
            found.append(logs.gather(-1, batch[:, 1:, None]).squeeze(-1))
            progress.advance()
    del model
    gc.collect()  # a streamed model and its hooks refer to each other: without this, the next model would be loaded beside it
    result = torch.cat(found)
    if not bool(result.isfinite().all()):
        raise CheckpointError(
            f"{checkpoint.source.name} gives the text a likelihood that is not finite", hint="leave this source out"
        )
    return result
