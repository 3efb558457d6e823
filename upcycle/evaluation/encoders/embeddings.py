"""Embeddings of sentences or images: how near an encoder's are to its dense parent's, and whether they find the same neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity, normalize

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.models.model_inputs import states_model

if TYPE_CHECKING:
    from upcycle.progress import Progress

NEAREST = 10
_LEAST_CHARACTERS = 40  # of a line that counts as a sentence
_LONGEST = 128  # tokens
_BATCH = 32
_POOLING = "1_Pooling/config.json"  # of sentence-transformers


@dataclass(frozen=True)
class EmbeddingResult:
    """Compares an encoder's embeddings with its reference's.

    Attributes:
        what: what was embedded.
        items: how many.
        cosine: the mean cosine between both embeddings of an item.
        nearest: how many neighbours are compared.
        recall: the share of the ``nearest`` neighbours by the reference that are so by the model, too.
    """

    what: str
    items: int
    cosine: float
    nearest: int
    recall: float


def sentences(contents: Sequence[str], most: int) -> list[str]:
    """Return at most ``most`` different lines of texts, of 40 characters and more, evenly spread.

    Raises:
        UsageError: there are fewer than three.
    """
    lines = [line.strip() for content in contents for line in content.splitlines()]
    lines = [line for line in dict.fromkeys(lines) if len(line) >= _LEAST_CHARACTERS]
    if len(lines) < 3:
        raise UsageError(
            f"the texts have {len(lines)} lines of {_LEAST_CHARACTERS} characters and more, and neighbours are sought among them",
            hint="name a text with a sentence per line: --text FILE",
        )
    return lines if len(lines) <= most else [lines[i * len(lines) // most] for i in range(most)]


def pools_first(folder: Path) -> bool:
    """Return whether a sentence encoder's embedding is the state of its first token and not the mean of all."""
    path = folder / _POOLING
    if not path.is_file():
        return False
    try:
        found = read_json(path)
    except CheckpointError:
        return False
    return isinstance(found, dict) and bool(found.get("pooling_mode_cls_token"))


def embed_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], context: int, first: bool, progress: Progress
) -> torch.Tensor:
    """Return unit vectors ``[N, d]``: the states of each text's first token, or the means of all its tokens' states."""
    found = []
    with progress.phase("embedding", len(texts)), torch.no_grad():
        for start in range(0, len(texts), _BATCH):
            some = list(texts[start : start + _BATCH])
            limits = {"padding": True, "truncation": True, "max_length": min(_LONGEST, context)}
            inputs = tokenizer(some, return_tensors="pt", **limits)
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            states = states_model(model)(**given).last_hidden_state
            mask = given["attention_mask"][..., None]
            found.append(states[:, 0] if first else (states * mask).sum(1) / mask.sum(1))
            progress.advance(len(some))
    return normalize(torch.cat(found).double(), dim=-1)


def nearest(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """Return which others ``[N, N]`` are among the ``count`` nearest of each of the unit vectors ``[N, d]``."""
    scores = vectors @ vectors.T
    scores.fill_diagonal_(-torch.inf)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count).indices, True)


def compared(found: torch.Tensor, reference: torch.Tensor, what: str) -> EmbeddingResult:
    """Compare two encoders' embeddings ``[N, d]`` of the same items."""
    count = min(NEAREST, len(found) - 1)
    same = (nearest(found, count) & nearest(reference, count)).sum().item()
    cosine = cosine_similarity(found, reference, dim=-1).mean().item()
    return EmbeddingResult(what, len(found), cosine, count, same / (count * len(found)))
