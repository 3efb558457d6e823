"""Copies the small files that go with the weights: tokenizer, processor, chat template, generation config, licence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from upcycle.architectures.clean_settings import CLEANERS, PROCESSORS, clean_file
from upcycle.architectures.stock import load_tokenizer
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.files.links import copy_inside, inside

_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    *PROCESSORS,
)
_ALWAYS = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*")


def copy_companions(checkpoint: Checkpoint, folder: Path, tokenizer: bool) -> None:
    """Copy a checkpoint's small files into ``folder``; settings that name code, other repositories or files are left out."""
    copy_files(checkpoint.source.path, folder, tokenizer)


def copy_files(source: Path, folder: Path, tokenizer: bool) -> None:
    """Copy the small files of a folder or a ``.gguf`` file, as :func:`copy_companions` does.

    Args:
        source: the folder or file.
        folder: where to copy them.
        tokenizer: copy the tokenizer, too.

    Raises:
        CheckpointError: a file is a link that leaves the source.
    """
    if source.is_file():
        if tokenizer:
            load_tokenizer(source).save_pretrained(folder)
        return
    for path in _found(source, tokenizer):
        if path.name in CLEANERS:
            content = clean_file(inside(path, source))
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / path.name).write_text(text, encoding="utf-8")
        else:
            copy_inside(path, source, folder / path.name)


def check_companions(source: Path, tokenizer: bool) -> None:
    """Refuse, before anything is converted, what :func:`copy_files` would refuse.

    Raises:
        CheckpointError: a file is a link that leaves the source.
    """
    for path in _found(source, tokenizer) if source.is_dir() else ():
        inside(path, source)


def _found(source: Path, tokenizer: bool) -> Iterator[Path]:
    for pattern in _ALWAYS + (_TOKENIZER if tokenizer else ()):
        yield from (path for path in sorted(source.glob(pattern)) if path.is_file())
