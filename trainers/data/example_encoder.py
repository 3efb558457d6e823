"""Turns conversations and pairs into token ids, of which only those of answers are learned. T tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from upcycle.errors import UsageError
from upcycle.text.reading.conversations import Broken, Example, TextOrExample
from upcycle.trainers.data.chat_rendering import RefusedError, Rendered, Renderer
from upcycle.trainers.data.chat_templates import ChatTemplate
from upcycle.trainers.data.token_codes import coded
from upcycle.trainers.data.token_shards import Encoder, PicturedCodes
from upcycle.trainers.pictures.encoded_pictures import PictureIds
from upcycle.trainers.pictures.pictures import Picture, PictureError, Pictures

_FORMAT = "3"  # part of every key: raise it, and older shards are not read


class _Encoded(NamedTuple):
    """Ids of one conversation, and which of them are learned."""

    ids: list[int]
    learned: list[bool]
    pictures: tuple[Picture, ...] = ()


class ExampleEncoder(Encoder):
    """Encodes examples, as :mod:`upcycle.trainers.data.token_codes` stores them; of a preference, the better one comes first.

    Ids are those of ``apply_chat_template``. A token is learned if any of its characters is an answer's. The end-of-text token
    closes an example, unless its text ends with it already; it is learned where the last message is an answer that is. The tokens of
    an image are those that the model's processor puts in the place of its mark; they are never learned.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_of_text: bool,
        template: ChatTemplate | None,
        loss_on: str,
        pictures: Pictures | None = None,
    ) -> None:
        """Without a ``template``, a prompt and its response are put together as they stand.

        With ``pictures``, what the model reads of images, examples may have some.

        Raises:
            UsageError: the tokenizer has no end-of-text token, or cannot say which characters a token has.
        """
        super().__init__(tokenizer, end_of_text)
        self._all = loss_on == "all"
        self._renderer = Renderer(tokenizer, template, everything=self._all) if template else None
        if template and not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                "conversations need a fast tokenizer, which says where its tokens lie in the text",
                hint="save the model's tokenizer with a tokenizer.json",
            )
        self._images = PictureIds(pictures, self._renderer) if pictures else None
        facts: tuple[Any, ...] = (_FORMAT, self.fingerprint, template.source if template else None, loss_on)
        facts = (*facts, pictures.fingerprint) if pictures else facts
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def encode(self, documents: Sequence[TextOrExample]) -> list[list[int] | Broken]:
        """Ids of each example, none where nothing of it is learned, or why it cannot be trained on."""
        examples = [document for document in documents if isinstance(document, Example)]
        assert len(examples) == len(documents), "a domain has either text or examples"
        sides = list(chain.from_iterable(_sides(example) for example in examples))
        sides = self._images.written(sides) if self._images else sides
        encoded = iter(self._rendered(self._renderer, sides) if self._renderer else self._plain(sides))
        return [self._joined([next(encoded) for _ in _sides(example)]) for example in examples]

    def _joined(self, sides: list[_Encoded | Broken]) -> list[int] | Broken:
        """The codes of one example; none where nothing of a side is learned."""
        ids: list[int] = []
        learned: list[bool] = []
        pictures: tuple[Picture, ...] = ()
        begins = None
        for side in sides:
            if isinstance(side, Broken):
                return side
            if not self._all and not any(side.learned[1:]):  # nothing predicts the first token
                return []
            begins = len(ids) or None
            ids += side.ids
            learned += side.learned
            pictures += side.pictures
        codes = coded(np.array(ids, np.int64), np.array(learned, bool), begins)
        return PicturedCodes(codes, pictures) if pictures else codes

    def _encoded(self, example: Example, text: str, ids: list[int], learned: list[bool]) -> _Encoded | Broken:
        """The ids of one example, with those of its images in the place of their marks."""
        learned = [True] * len(ids) if self._all else learned
        if self._images is None:
            return _Encoded(ids, learned)
        try:
            return _Encoded(*self._images.placed(example, text, ids, learned))
        except PictureError as error:
            return Broken(f"{example.where}: {error}", None if error.path is None else str(error.path))

    def _rendered(self, renderer: Renderer, examples: list[Example]) -> list[_Encoded | Broken]:
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
        result: list[_Encoded | Broken] = []
        for example, each in zip(examples, found, strict=True):
            if isinstance(each, Broken):
                result.append(each)
                continue
            ids, offsets = next(made)
            learned = _learned(np.array(offsets, np.int64).reshape(-1, 2), each)
            closed = each.text.rstrip().endswith(str(self._tokenizer.eos_token)) if self._tail else True
            last = bool(example.taught[-1])
            tail = [] if closed else self._tail
            result.append(self._encoded(example, each.text, [*ids, *tail], [*learned.tolist(), *[last] * len(tail)]))
        return result

    def _plain(self, examples: list[Example]) -> list[_Encoded | Broken]:
        longer = next((example for example in examples if len(example.messages) != 2), None)
        if longer is not None:
            raise UsageError(
                f"{longer.where}: {len(longer.messages)} messages, and joined: plain puts one prompt and one answer together",
                hint="set joined: template",
            )
        texts = [[str(message["content"]) for message in example.messages] for example in examples]
        ids = iter(self._tokenizer(list(chain(*texts)), add_special_tokens=False, verbose=False)["input_ids"])
        result: list[_Encoded | Broken] = []
        for example, said in zip(examples, texts, strict=True):
            prompt, response = next(ids), next(ids)
            asked, answer = [*self._head, *prompt], [*response, *self._tail]
            learned = [False] * len(asked) + [True] * len(answer)
            result.append(self._encoded(example, "".join(said), [*asked, *answer], learned))
        return result


def _sides(example: Example) -> list[Example]:
    """An example, or, of a preference, the better and the worse one."""
    if not example.rejected:
        return [example]
    return [replace(example, rejected=()), replace(example, messages=example.rejected, rejected=())]


def _learned(offsets: NDArray[np.int64], rendered: Rendered) -> NDArray[np.bool_]:
    """Bool ``[T]``: which tokens, of characters ``[T, 2]``, have one of an answer."""
    learned = np.zeros(len(offsets), bool)
    for start, end in rendered.answers:
        learned |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return learned
