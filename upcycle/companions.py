"""The small files that go with the weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from upcycle.checkpoint import Checkpoint
from upcycle.stock import CLEANERS, clean_file, load_tokenizer

_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
_ALWAYS = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*")


def copy_companions(checkpoint: Checkpoint, folder: Path, tokenizer: bool) -> None:
    """Copy them into ``folder``; what names code, other repositories or files is left out of settings."""
    copy_files(checkpoint.source.path, folder, tokenizer)


def copy_files(source: Path, folder: Path, tokenizer: bool) -> None:
    """The same from a folder or a ``.gguf`` file."""
    if source.is_file():
        if tokenizer:
            load_tokenizer(source).save_pretrained(folder)
        return
    for pattern in _ALWAYS + (_TOKENIZER if tokenizer else ()):
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name in CLEANERS:
                content = clean_file(path)
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (folder / path.name).write_text(text, encoding="utf-8")
            elif path.is_file():
                shutil.copyfile(path, folder / path.name)
