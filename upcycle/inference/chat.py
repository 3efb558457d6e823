"""A conversation, and the token ids of it that a model continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upcycle.errors import UsageError


class Conversation:
    """Lines and answers. ``templated`` says whether the tokenizer has a chat template; without one, they are lines of plain text.

    Args:
        tokenizer: stock; its chat template is run in transformers' sandbox.
        context: the most tokens that the model reads; None: any number.
        system: the system message; left out where there is no template.
    """

    def __init__(self, tokenizer: Any, context: int | None, system: str | None = None) -> None:
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer
        self._context = context
        self._system = [{"role": "system", "content": system}] if system and self.templated else []
        self._said: list[dict[str, str]] = []

    def say(self, line: str, room: int) -> tuple[list[int], int]:
        """Add a line of the user's.

        Returns the token ids to continue, and how many earlier messages had to be forgotten to leave room for ``room`` tokens.

        Raises:
            UsageError: the line alone is too long, or the template refuses the messages.
        """
        self._said.append({"role": "user", "content": line})
        dropped = 0
        while True:
            ids = self._encode(self._said)
            if self._context is None or len(ids) + room <= self._context or len(self._said) == 1:
                break
            # A question goes with its answer: templates want them in turns.
            del self._said[:2]
            dropped += 2
        if self._context is not None and len(ids) >= self._context:
            self._said.clear()
            raise UsageError(f"the line has {len(ids):,} tokens, and the model reads {self._context:,}")
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
            raise UsageError(f"the chat template refuses this: {error}", hint="leave --system out") from None
        templated: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return templated
