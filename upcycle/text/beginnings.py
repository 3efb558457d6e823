"""Reads the first tokens of texts: of a file of rows each row's, of running text pieces of that length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path
from upcycle.text.mixture import mixed_windows, read_texts, text_names
from upcycle.text.reading.columns import Reading
from upcycle.text.reading.conversations import Broken, Example
from upcycle.text.reading.documents import find_pieces
from upcycle.text.reading.file_kinds import file_kind
from upcycle.text.reading.plain_text import DEMO_TEXTS
from upcycle.text.windows import encode

if TYPE_CHECKING:
    from upcycle.recipe.recipe_parts import CalibrationRecipe

_WHOLE = 1 << 62  # bytes; a piece of this size is the whole file


def beginnings(wanted: CalibrationRecipe, tokenizer: Any, length: int) -> torch.Tensor:
    """Return the first ``length`` token ids of every text, ``[N, length]``, as many as ``wanted.tokens`` allow.

    A shorter text is repeated up to that length, so that the mean over it is about its own.

    Raises:
        UsageError: a text cannot be read, or lacks the recipe's column, or a conversation has no template.
    """
    most = max(1, wanted.tokens // length)
    rows: list[str] = []
    running: list[str] = []
    for name in text_names(wanted.texts):
        path = user_path(name)
        of_rows = name not in DEMO_TEXTS and path.is_file() and file_kind(path) != "text"
        (rows if of_rows else running).append(name)
    found = [torch.tensor(ids) for name in rows for ids in _first(user_path(name), wanted.column, tokenizer, length)]
    if running:
        texts = read_texts(wanted.model_copy(update={"text": running}))
        found += [*mixed_windows(texts, tokenizer, most * length, length)]
    if not found:
        raise UsageError("the calibration text has no instructions", hint="--set calibration.column=NAME")
    chosen = torch.linspace(0, len(found) - 1, min(most, len(found))).long().unique().tolist()
    return torch.stack([found[place].long() for place in chosen])


def _first(path: Path, column: str, tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Yield the first token ids of every row of a file."""
    for piece in find_pieces([str(path)], _WHOLE):
        for row in piece.records(Reading(column)):
            if isinstance(row, Broken):
                raise UsageError(row.message, hint="--set calibration.column=NAME")
            ids = _conversation(row, tokenizer) if isinstance(row, Example) else encode(tokenizer, row).tolist()
            if ids:
                yield (ids * (length // len(ids) + 1))[:length]


def _conversation(row: Example, tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{row.where}: a conversation, and the tokenizer has no chat template",
            hint="name a column of plain text: --set calibration.column=prompt",
        )
    text = tokenizer.apply_chat_template([dict(message) for message in row.messages], tokenize=False)
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
