"""Reads the texts that the models are measured on, as windows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One text: token ids ``[N, W]``, and a remark on which part of it they are and how much of it was calibrated on."""

    name: str
    windows: torch.Tensor
    remark: str = ""


def read_domains(
    subject: Subject, texts: Sequence[str], tokens: int, calibrations: Sequence[Mapping[str, Any]] = ()
) -> tuple[Any, list[Domain]]:
    """Return the tokenizer and every text's windows.

    Args:
        subject: the model; from texts that it was calibrated on, only the held-out part is used.
        texts: UTF-8 files or names of embedded texts; default: all embedded texts.
        tokens: most tokens to read of each.
        calibrations: of other models; what was held out of any of them is read in the place of the whole text.

    Raises:
        UsageError: a text is missing, empty or too short.
        EnvironmentFault: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(subject.folder)
    context = subject.text_config.get("max_position_embeddings", WINDOW)
    known = [(subject.record or {}).get("calibration"), *calibrations]
    domains: list[Domain] = []
    for name in texts or DEMO_TEXTS:
        # Of the same text, the same part is held out of every calibration: the shortest is what nobody was calibrated on.
        content, remark = min((unseen(name, each) for each in known), key=lambda found: len(found[0]))
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
