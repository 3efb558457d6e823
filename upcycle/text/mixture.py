"""Reads calibration texts (plain files, files of rows, hub datasets, embedded texts) and mixes their tokens evenly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path
from upcycle.text.held_out import Parts, by_document, by_position, sketch
from upcycle.text.hub_dataset import hub_rows, is_dataset
from upcycle.text.reading.columns import Reading
from upcycle.text.reading.conversations import Broken
from upcycle.text.reading.documents import find_pieces
from upcycle.text.reading.file_kinds import file_kind
from upcycle.text.reading.plain_text import DEMO_TEXTS, EVERYDAY, SELF_WRITTEN, read_text
from upcycle.text.windows import encode

if TYPE_CHECKING:
    from upcycle.recipe.recipe_parts import CalibrationRecipe

_CHARACTERS_PER_TOKEN = 8  # characters read from a stream for each token wanted; most texts need half of that
_WHOLE = 1 << 62  # bytes; a piece of this size is the whole file
_LONG = 1 << 20  # characters; shorter texts are tokenised whole, which takes little time


def read_texts(wanted: CalibrationRecipe) -> dict[str, str]:
    """Return, for the name of every calibration text, the part that is calibrated on; of streams, as much as is needed.

    Raises:
        UsageError: a text cannot be read, or lacks the recipe's column.
    """
    return {name: parts.read for name, parts in read_parts(wanted).items()}


def read_parts(wanted: CalibrationRecipe) -> dict[str, Parts]:
    """Return, for the name of every calibration text, the part that is calibrated on and the part that is held out.

    Text that the model writes itself is in neither: there is none before the model has written it, and nothing is measured on it.

    Raises:
        UsageError: a text cannot be read, or lacks the recipe's column.
    """
    names = [name for name in text_names(wanted.texts) if name != SELF_WRITTEN]
    if not names:
        return {}
    enough = _CHARACTERS_PER_TOKEN * (wanted.tokens // len(names) + wanted.window)
    return dict(_parts(tuple(names), wanted.column, enough, tuple(map(_state, names))))


def traces(wanted: CalibrationRecipe) -> dict[str, Any]:
    """Return what ``upcycle.json`` keeps of the texts: hashes of lines that were read, and how much was held out."""
    parts = read_parts(wanted)
    held_out = {name: one.how for name, one in parts.items()}
    return {"held_out": held_out, "lines": sketch(one.read for one in parts.values())}


def _state(name: str) -> tuple[int, int] | None:
    """Return time and size of a file, so that a changed file is not taken from the cache; None where it is no file."""
    path = user_path(name)
    found = path.stat() if path.is_file() else None
    return (found.st_mtime_ns, found.st_size) if found else None


@lru_cache(maxsize=1)  # a conversion needs the texts three times, and a dataset comes over the network
def _parts(
    names: tuple[str, ...], column: str, enough: int, states: tuple[object, ...]
) -> tuple[tuple[str, Parts], ...]:
    return tuple((name, _text(name, column, enough)) for name in names)


def mixed_windows(texts: Mapping[str, str], tokenizer: Any, tokens: int, window: int) -> torch.Tensor:
    """Return windows of token ids ``[N, W]``, evenly spread over each text; consecutive windows come from different texts.

    Where a text is too short for its share, there are fewer windows: an even mix matters more than their number. There is one window
    at least, even if fewer tokens are wanted.

    Args:
        texts: name -> text.
        tokenizer: the model's.
        tokens: how many tokens are wanted in all.
        window: tokens per window, ``W``.

    Raises:
        UsageError: a text is shorter than one window.
    """
    share = max(1, -(-(tokens // window) // len(texts)))
    pieces = []
    for name, text in texts.items():
        piece = _from_long(tokenizer, text, share, window)
        pieces.append(_from_whole(tokenizer, name, text, share, window) if piece is None else piece)
    rows = [row for group in zip_longest(*pieces) for row in group if row is not None]
    return torch.stack(rows[: max(1, tokens // window)])


def _from_long(tokenizer: Any, text: str, share: int, window: int) -> torch.Tensor | None:
    """Return windows ``[share, W]`` of a text, each at the beginning of a line if possible, without tokenising all of it.

    None where the text is not far longer than its windows.
    """
    length = _CHARACTERS_PER_TOKEN * window
    if len(text) < max(_LONG, 2 * share * length):
        return None
    starts = torch.linspace(0, len(text) - 2 * length, share, dtype=torch.float64).long().tolist()
    starts = [1 + max(text.find("\n", start, start + length), start - 1) for start in starts]
    ids = tokenizer([text[start : start + length] for start in starts], add_special_tokens=False)["input_ids"]
    if min(map(len, ids)) < window:
        return None
    return torch.tensor([row[:window] for row in ids])


def _from_whole(tokenizer: Any, name: str, text: str, share: int, window: int) -> torch.Tensor:
    ids = encode(tokenizer, text)
    available = ids[: len(ids) // window * window].view(-1, window)
    if not len(available):
        raise UsageError(
            f"calibration text {name} has {len(ids)} tokens, fewer than one window of {window}",
            hint=f"choose a longer text, or --set calibration.window={max(8, len(ids))}",
        )
    chosen = torch.linspace(0, len(available) - 1, min(share, len(available))).long().unique()
    return available[chosen]


def text_names(texts: list[str]) -> list[str]:
    """Return the names of texts, with ``demo`` replaced by the names of all embedded texts."""
    return list(chain.from_iterable(DEMO_TEXTS if name == "demo" else [name] for name in texts))


def _text(name: str, column: str, characters: int) -> Parts:
    path = user_path(name)
    if name in DEMO_TEXTS:
        return by_position(read_text(name))
    if name == EVERYDAY and not path.is_file():
        raise UsageError(
            f"{name} is the embedded text by which is measured what was lost of text that was not calibrated on",
            hint="calibrate on a file of yours, on demo, or on self",
        )
    if path.is_file():
        kind = file_kind(path)
        return by_position(read_text(name)) if kind == "text" else by_document(_rows(path, column), characters)
    if path.is_dir():
        raise UsageError(
            f"calibration text {name} is a folder, and this model reads text files",
            hint="name the files in it, separated by commas; folders of images are for models that read images alone",
        )
    if not is_dataset(name):
        raise UsageError(
            f"no such calibration text: {name}",
            hint="a UTF-8 file, rows (.jsonl, .json, .csv, .parquet), a hub dataset (org/name[:config[:split]]), demo, "
            f"self, or one of: {', '.join(DEMO_TEXTS)}",
        )
    return by_document((_column(row, column, name) for row in hub_rows(name)), characters)


def _rows(path: Path, column: str) -> Iterator[str]:
    """Yield the texts in a file of rows, whatever its format, as training reads them."""
    for piece in find_pieces([str(path)], _WHOLE):
        for row in piece.records(Reading(column)):
            if isinstance(row, Broken):
                raise UsageError(row.message, hint="--set calibration.column=NAME")
            if isinstance(row, str) and row.strip():
                yield row


def _column(row: Any, column: str, where: str) -> str:
    found = row.get(column) if isinstance(row, dict) else None
    if not isinstance(found, str):
        columns = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(
            f"{where}: no text in column '{column}'; the columns are {columns}", hint="--set calibration.column=NAME"
        )
    return found
