"""What has been said, as the token ids that a model goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upcycle.errors import UsageError


class Conversation:
    """Lines and answers. ``templated`` says whether the tokenizer knows how a talk looks; else it is plain text, line by line.

    Args:
        tokenizer: stock; its chat template is run in transformers' sandbox.
        context: tokens that the model reads at most, None: as many as there are.
        system: what is said first, where there is a template.
    """

    def __init__(self, tokenizer: Any, context: int | None, system: str | None = None) -> None:
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer
        self._context = context
        self._system = [{"role": "system", "content": system}] if system and self.templated else []
        self._said: list[dict[str, str]] = []

    def say(self, line: str, room: int) -> tuple[list[int], int]:
        """Token ids to go on from, and how many earlier messages had to be forgotten so that ``room`` tokens are left.

        Raises:
            UsageError: the line alone is too long, or the template refuses what is said.
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
        """Remember what the model said."""
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
