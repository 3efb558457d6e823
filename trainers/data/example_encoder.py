"""Turns conversations and pairs into token ids, of which only those of answers are learned. T tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.errors import UsageError
from upcycle.text.reading.conversations import Broken, Example, TextOrExample
from upcycle.trainers.data.chat_rendering import RefusedError, Rendered, Renderer
from upcycle.trainers.data.chat_templates import ChatTemplate
from upcycle.trainers.data.token_shards import Encoder

_FORMAT = "1"  # part of every key: raise it, and older shards are not read


class ExampleEncoder(Encoder):
    """Encodes examples: a token that is not learned is stored as ``-1 - id``, so that its mask needs no room of its own.

    Ids are those of ``apply_chat_template``. A token is learned if any of its characters is an answer's. The end-of-text token
    closes an example, unless its text ends with it already; it is learned where the last message is an answer that is.
    """

    def __init__(self, tokenizer: Any, end_of_text: bool, template: ChatTemplate | None, loss_on: str) -> None:
        """Without a ``template``, a prompt and its response are put together as they stand.

        Raises:
            UsageError: the tokenizer has no end-of-text token, or cannot say which characters a token has.
        """
        super().__init__(tokenizer, end_of_text)
        self._renderer = Renderer(tokenizer, template) if template else None
        self._all = loss_on == "all"
        if template and not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                "conversations need a fast tokenizer, which says where its tokens lie in the text",
                hint="save the model's tokenizer with a tokenizer.json",
            )
        facts = (_FORMAT, self.fingerprint, template.source if template else None, loss_on)
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def encode(self, documents: Sequence[TextOrExample]) -> list[list[int] | Broken]:
        """Ids of each example, none where nothing of it is learned, or why it cannot be trained on."""
        examples = [document for document in documents if isinstance(document, Example)]
        assert len(examples) == len(documents), "a domain has either text or examples"
        return self._rendered(self._renderer, examples) if self._renderer else self._plain(examples)

    def _rendered(self, renderer: Renderer, examples: list[Example]) -> list[list[int] | Broken]:
        found: list[Rendered | Broken] = []
        for example in examples:
            try:
                found.append(renderer(example))
            except RefusedError as error:
                found.append(Broken(f"{example.where}: {error}"))
        texts = [each.text for each in found if isinstance(each, Rendered)]
        if not texts:
            return [each for each in found if isinstance(each, Broken)]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        made = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        result: list[list[int] | Broken] = []
        for example, each in zip(examples, found, strict=True):
            if isinstance(each, Broken):
                result.append(each)
                continue
            ids, offsets = next(made)
            learned = _learned(np.array(offsets, np.int64).reshape(-1, 2), each)
            closed = each.text.rstrip().endswith(str(self._tokenizer.eos_token)) if self._tail else True
            last = bool(example.taught[-1])
            tail = [] if closed else self._tail
            result.append(self._signed([*ids, *tail], np.append(learned, [last] * len(tail)).astype(bool)))
        return result

    def _plain(self, examples: list[Example]) -> list[list[int] | Broken]:
        texts = [[str(message["content"]) for message in example.messages] for example in examples]
        ids = iter(self._tokenizer(list(chain(*texts)), add_special_tokens=False, verbose=False)["input_ids"])
        result: list[list[int] | Broken] = []
        for _ in examples:
            prompt, response = next(ids), next(ids)
            whole = [*self._head, *prompt, *response, *self._tail]
            learned = np.arange(len(whole)) >= len(self._head) + len(prompt)
            result.append(self._signed(whole, learned))
        return result

    def _signed(self, ids: list[int], learned: NDArray[np.bool_]) -> list[int]:
        if self._all:
            return ids
        if not learned.any():
            return []
        whole = np.array(ids, np.int64)
        signed: list[int] = np.where(learned, whole, ~whole).tolist()
        return signed


def _learned(offsets: NDArray[np.int64], rendered: Rendered) -> NDArray[np.bool_]:
    """Bool ``[T]``: which tokens, of characters ``[T, 2]``, have one of an answer."""
    learned = np.zeros(len(offsets), bool)
    for start, end in rendered.answers:
        learned |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return learned
