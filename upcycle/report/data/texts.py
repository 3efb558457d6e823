"""What the models are measured on: windows of token ids, one domain after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.report.data.subject import Subject
from upcycle.text.held_out import unseen
from upcycle.text.reading.plain_text import DEMO_TEXTS
from upcycle.text.windows import encode, windows_of

WINDOW = 256


@dataclass(frozen=True)
class Domain:
    """One text: token ids ``[N, W]``, and what has to be said of it: which part it is, how much of it was calibrated on."""

    name: str
    windows: torch.Tensor
    remark: str = ""


def read_domains(subject: Subject, texts: Sequence[str], tokens: int) -> tuple[Any, list[Domain]]:
    """The tokenizer and every text's windows.

    Args:
        subject: the model; of texts it was calibrated on, only what was held out is taken.
        texts: UTF-8 files or names of embedded texts, all of those by default.
        tokens: at most as many of each.

    Raises:
        UsageError: a text is missing, empty or too short.
        EnvironmentFault: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(subject.folder)
    context = (subject.config or {}).get("max_position_embeddings", WINDOW)
    calibration = (subject.record or {}).get("calibration")
    domains: list[Domain] = []
    for name in texts or DEMO_TEXTS:
        content, remark = unseen(name, calibration)
        ids = encode(tokenizer, content)
        window = max(2, min(WINDOW, context, tokens, len(ids)))
        domains.append(Domain(_label(name, [d.name for d in domains]), windows_of([ids], tokens, window), remark))
    return tokenizer, domains


def _label(name: str, taken: list[str]) -> str:
    stem = Path(name).stem
    number, label = 1, stem
    while label in taken:
        number += 1
        label = f"{stem}-{number}"
    return label
