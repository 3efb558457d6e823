"""Reads the calibration text of a recipe as windows of token ids, and says what the model has to write itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.own_text import OwnText
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.hardware.memory import available_memory
from upcycle.planning.own_text import model_bytes
from upcycle.progress import Progress
from upcycle.text.mixture import mixed_windows, read_texts
from upcycle.text.windows import frame_of

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.planning.job import PlannedJob
    from upcycle.recipe.recipe_parts import CalibrationRecipe


def calibration_windows(
    job: PlannedJob, checkpoint: Checkpoint, progress: Progress
) -> tuple[torch.Tensor | None, OwnText | None]:
    """Return the calibration tokens of a conversion that are read, int64 ids ``[N, W]``, and what the model is to write.

    Raises:
        UsageError: the recipe leaves no tokenizer, or a text cannot be read, has no such column, or is shorter than one window.
        EnvironmentFault: the model is to write text, and does not fit into memory.
    """
    wanted = job.recipe.calibration
    if job.recipe.tokenizer == "none":
        raise UsageError("calibration reads text, and --tokenizer none leaves no tokenizer", hint="--tokenizer copy")
    window = min(wanted.window, job.context, wanted.tokens)
    tokenizer = load_tokenizer(checkpoint.source.path)
    family = getattr(job, "family", None)
    if family is not None and (family.encoder or family.reads == "pairs"):
        return _framed(wanted, window, tokenizer, progress), None
    read, own = tokens_of(wanted, read_texts(wanted), window, tokenizer, checkpoint, job.recipe.seed)
    found = (0 if read is None else read.numel()) + (own.windows * window if own else 0)
    _note_short(found, wanted, progress)
    return read, own


def _note_short(found: int, wanted: CalibrationRecipe, progress: Progress) -> None:
    if found < 0.9 * wanted.tokens:
        progress.note(f"calibrating on {found:,} tokens: the texts hold no more (asked for {wanted.tokens:,})")


def _framed(wanted: CalibrationRecipe, window: int, tokenizer: Any, progress: Progress) -> torch.Tensor:
    """Return windows ``[N, W]`` for an encoder, each a piece of text between the special tokens that it has seen around texts."""
    frame = frame_of(tokenizer)
    inner = max(1, window - frame.tokens)
    pieces = mixed_windows(read_texts(wanted), tokenizer, max(1, wanted.tokens // window) * inner, inner)
    windows = frame.around(pieces)
    _note_short(windows.numel(), wanted, progress)
    return windows


def tokens_of(
    wanted: CalibrationRecipe,
    contents: dict[str, str],
    window: int,
    tokenizer: Any,
    checkpoint: Checkpoint,
    seed: int,
) -> tuple[torch.Tensor | None, OwnText | None]:
    """Return windows ``[N, W]`` of the files' ``contents``, and the windows that the model is to write beside them.

    The model writes half of the tokens, and what files that are too short leave over.

    Args:
        wanted: the texts and the number of tokens.
        contents: the text of every file, by name.
        window: tokens per window, ``W``.
        tokenizer: the model's.
        checkpoint: the model.
        seed: seed of what the model writes.

    Raises:
        UsageError: a text is shorter than one window.
        EnvironmentFault: the model is to write text, and does not fit into memory.
    """
    if not wanted.own:
        return mixed_windows(contents, tokenizer, wanted.tokens, window), None
    _check_memory(checkpoint, window, wanted.tokens)
    total = max(1, wanted.tokens // window)
    read = mixed_windows(contents, tokenizer, wanted.tokens // 2, window) if contents and total > 1 else None
    vocabulary = min(len(tokenizer), int(_sizes(checkpoint)["vocab_size"]))
    left = total - (0 if read is None else len(read))
    return read, OwnText(left, window, seed, vocabulary, tuple(sorted(set(tokenizer.all_special_ids))))


def _check_memory(checkpoint: Checkpoint, window: int, tokens: int) -> None:
    weights = sum(spec.elements for spec in checkpoint.store.specs.values())
    needed, free = model_bytes(weights, _sizes(checkpoint), window, tokens), available_memory()
    if needed > free:
        raise EnvironmentFault(
            f"to write its own calibration text, the whole model must be in memory: about {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free",
            hint="calibrate on a text file, which needs one layer at a time: --calibration FILE",
        )


def _sizes(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the sizes of a model by their keys in ``config.json``; of a model of parts, those of its text model."""
    return vars(checkpoint.config) if isinstance(checkpoint, DenseCheckpoint) else checkpoint.raw_config
