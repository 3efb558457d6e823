"""The small files that go with the weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from upcycle.checkpoint import Checkpoint
from upcycle.tensor_files import read_json

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
    """Copy them into ``folder``; references to code in the source repository (``auto_map``) are dropped."""
    copy_files(checkpoint.source.path, folder, tokenizer)


def copy_files(source: Path, folder: Path, tokenizer: bool) -> None:
    """The same from a folder or a ``.gguf`` file."""
    if source.is_file():
        if tokenizer:
            _tokenizer_from_gguf(source, folder)
        return
    for pattern in _ALWAYS + (_TOKENIZER if tokenizer else ()):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in (content := read_json(settings)):
        del content["auto_map"]
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_from_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
