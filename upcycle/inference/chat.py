"""A conversation, as messages and as the token ids that a model continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upcycle.errors import UsageError


class Conversation:
    """The user's messages and the model's answers, in turn.

    ``templated`` says whether the tokenizer has a chat template. Without one, all messages are joined as lines of plain text.

    Args:
        tokenizer: a tokenizer of transformers, which runs the chat template in a sandbox.
        context: the most tokens that the model can read; None: any number.
        system: the system message; ignored without a chat template.
    """

    def __init__(self, tokenizer: Any, context: int | None, system: str | None = None) -> None:
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer
        self._context = context
        self._system = [{"role": "system", "content": system}] if system and self.templated else []
        self._said: list[dict[str, str]] = []

    def say(self, line: str, room: int) -> tuple[list[int], int]:
        """Add a message of the user's.

        Returns the token ids that the model continues, and how many of the oldest messages were dropped so that an answer of
        ``room`` tokens still fits.

        Raises:
            UsageError: the message alone is too long, or the chat template refuses the conversation.
        """
        self._said.append({"role": "user", "content": line})
        dropped = 0
        while True:
            ids = self._encode(self._said)
            if self._context is None or len(ids) + room <= self._context or len(self._said) == 1:
                break
            # A question is dropped with its answer, because templates require turns.
            del self._said[:2]
            dropped += 2
        if self._context is not None and len(ids) >= self._context:
            self._said.clear()
            raise UsageError(f"this message has {len(ids):,} tokens, but the model reads at most {self._context:,}")
        return ids, dropped

    def answered(self, text: str) -> None:
        """Add the model's answer."""
        self._said.append({"role": "assistant", "content": text})

    def _encode(self, said: Sequence[dict[str, str]]) -> list[int]:
        if not self.templated:
            ids: list[int] = self._tokenizer("\n".join(message["content"] for message in said))["input_ids"]
            return ids
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [*self._system, *said], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise UsageError(
                f"the chat template refuses this conversation: {error}", hint="try without --system"
            ) from None
        templated: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return templated
