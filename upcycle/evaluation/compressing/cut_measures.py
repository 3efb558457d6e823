"""Measures compressed models beside the uncut one: perplexity by kind of text, KL, and what both write.

N windows of W tokens, V words in the vocabulary, P prompts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from upcycle.errors import UsageError
from upcycle.files.formats.token_files import TokenFile
from upcycle.models.stock_model import StockModel
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.held_out import FLATTERING, seen_share, sketch
from upcycle.text.mixture import mixed_windows, read_parts
from upcycle.text.reading.plain_text import EVERYDAY, read_text
from upcycle.text.windows import encode
from upcycle.verification.measure import batch_size

PROMPTS, PROMPT, WRITTEN = 32, 32, 32  # continuations that are compared, and tokens of each: read, and written
_LEAST = 16  # tokens of a text that is long enough to measure on


@dataclass(frozen=True)
class CutTexts:
    """Holds what compressed models are measured on.

    Attributes:
        domains: token ids ``[N, W]`` by text; those that were not calibrated on are last.
        unseen: the names of these.
        prompts: ``[P, L]``, beginnings that models continue, out of the other texts.
        written: how many tokens they write.
    """

    domains: dict[str, torch.Tensor]
    unseen: tuple[str, ...]
    prompts: torch.Tensor
    written: int

    @property
    def seen(self) -> list[str]:
        """The texts of kinds that were calibrated on."""
        return [name for name in self.domains if name not in self.unseen]

    @property
    def tokens(self) -> int:
        """Tokens that are read, without those of prompts."""
        return sum(ids.numel() for ids in self.domains.values())

    def disk_bytes(self, vocab_size: int) -> int:
        """Return the size of what :class:`CutMeter` keeps of the uncut model."""
        return 4 * vocab_size * sum(self.domains[name][:, 1:].numel() for name in self.seen)


def cut_texts(
    wanted: CalibrationRecipe, text: Sequence[str], tokens: int, window: int, context: int, tokenizer: Any
) -> CutTexts:
    """Read the texts to measure on: what a compression holds out of the calibration texts, and text of another kind.

    Args:
        wanted: the calibration texts.
        text: texts to measure on in the place of what is held out.
        tokens: tokens to measure on, per text.
        window: tokens per window.
        context: the longest text that the model can read.
        tokenizer: the model's.

    Raises:
        UsageError: a text cannot be read or is too short.
    """
    parts = read_parts(wanted)
    contents = {name: read_text(name) for name in text} or {name: one.held_out for name, one in parts.items()}
    everyday = read_text(EVERYDAY)
    others = (
        {} if seen_share(everyday, sketch(one.read for one in parts.values())) > FLATTERING else {EVERYDAY: everyday}
    )
    others = {name: content for name, content in others.items() if name not in contents}
    window = min(window, context)
    domains, shortest = {}, PROMPT
    for name, content in {**contents, **others}.items():
        length = len(encode(tokenizer, content[: 16 * window * 8]))
        if length < _LEAST:
            raise UsageError(
                f"{name}: what was held out of it is {length} tokens, too short to measure on",
                hint="a longer --calibration text, or --text FILE to measure on",
            )
        shortest = min(shortest, length)
        amount = tokens if name in contents else max(tokens // 2, window)
        domains[name] = mixed_windows({name: content}, tokenizer, amount, min(window, length))
    length = max(1, min(shortest, context - WRITTEN))
    prompts = mixed_windows(contents, tokenizer, PROMPTS * length, length)
    return CutTexts(domains, tuple(others), prompts, min(WRITTEN, context - length))


@dataclass(frozen=True)
class CutMeasures:
    """Holds what was measured of one model.

    Attributes:
        nats: the mean loss per token, by text.
        kl: the mean KL(uncut || it) of next tokens on the texts that were calibrated on, in nats.
        agreement: the share of the tokens it writes that are those of the uncut model at the same place.
    """

    nats: dict[str, float]
    kl: float
    agreement: float


class CutMeter:
    """Measures models, the uncut one first.

    Args:
        texts: what they read.
        vocabulary: the number V of tokens in the vocabulary.
        folder: where the uncut model's log probabilities are kept.
        streamed: whether the models keep one layer in memory, so that a pass should read many windows.
    """

    def __init__(self, texts: CutTexts, vocabulary: int, folder: Path, streamed: bool) -> None:
        self._texts, self._vocabulary, self._streamed = texts, vocabulary, streamed
        self._files = {name: TokenFile(folder / f"uncut.{n}", vocabulary) for n, name in enumerate(texts.seen)}
        self._said: torch.Tensor | None = None

    def uncut(self, model: StockModel) -> CutMeasures:
        """Measure the model before anything is cut, and keep what others are compared with."""
        nats = {}
        for name, ids in self._texts.domains.items():
            found: list[torch.Tensor] = []
            blocks = self._read(model, ids, found)
            if name in self._files:
                self._files[name].write(blocks)
            else:
                deque(blocks, maxlen=0)
            nats[name] = torch.cat(found).mean().item()
        self._said = continuations(model.model, self._texts.prompts, self._texts.written)
        return CutMeasures(nats, 0.0, 1.0)

    def cut(self, model: StockModel) -> CutMeasures:
        """Measure a compressed model."""
        assert self._said is not None, "the uncut model is measured first"
        nats, divergence, tokens = {}, 0.0, 0
        for name, ids in self._texts.domains.items():
            found: list[torch.Tensor] = []
            blocks = self._read(model, ids, found)
            if name in self._files:
                size = self._batch(ids) * (ids.shape[1] - 1)
                for theirs, ours in zip(self._files[name].blocks(size), blocks, strict=True):
                    divergence += kl_div(ours, theirs, log_target=True, reduction="none").sum(1).double().sum().item()
                    tokens += len(ours)
            else:
                deque(blocks, maxlen=0)
            nats[name] = torch.cat(found).mean().item()
        said = continuations(model.model, self._texts.prompts, self._texts.written)
        return CutMeasures(nats, max(0.0, divergence / tokens), (said == self._said).double().mean().item())

    def _batch(self, ids: torch.Tensor) -> int:
        return batch_size(self._vocabulary, ids, self._streamed)

    def _read(self, model: StockModel, ids: torch.Tensor, found: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the log probabilities ``[t, V]`` of next tokens, batch by batch, and add the losses ``[t]`` to ``found``."""
        for rows in ids.split(self._batch(ids)):
            logp = log_softmax(model.logits(rows)[:, :-1], -1).flatten(0, 1)
            found.append(-logp.gather(1, rows[:, 1:].reshape(-1, 1)).double().flatten())
            yield logp


def continuations(model: Any, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """Return what a stock model writes behind prompts ``[P, L]`` with greedy decoding: ``[P, count]``, whatever ends a text."""
    ids, past, written = prompts, None, []
    with torch.no_grad():
        for _ in range(count):
            output = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            written.append(ids)
    return torch.cat(written, 1)
