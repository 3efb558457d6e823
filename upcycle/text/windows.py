"""Turns texts into windows of token ids, and lets a stock model continue a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import whole_characters
from upcycle.text.reading.plain_text import read_text

if TYPE_CHECKING:
    import torch


def divided(content: str) -> tuple[str, str]:
    """Divide a text at the beginning of a line or a word: three quarters to calibrate on, and a quarter to measure on."""
    place = 3 * len(content) // 4
    cut = content.find("\n", place) + 1 or content.find(" ", place) + 1 or place
    return content[:cut], content[cut:]


def demo_parts(name: str) -> tuple[str, str]:
    """Divide an embedded text: three quarters to calibrate on, and a quarter to verify calibrated models on."""
    return divided(read_text(name))


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Return token ids ``[T]`` without special tokens; half characters, which tokenizers refuse, are read as U+FFFD."""
    import torch

    ids = tokenizer(whole_characters(text), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


class Frame(NamedTuple):
    """Holds the special tokens that an encoder's tokenizer puts before and behind every text (``[CLS]``, ``[SEP]``)."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.before) + len(self.behind)

    def around(self, windows: torch.Tensor) -> torch.Tensor:
        """Return windows ``[N, W]`` of token ids with these tokens before and behind each, ``[N, W + tokens]``."""
        import torch

        sides = [torch.tensor(ids, dtype=torch.long).expand(len(windows), -1) for ids in self]
        return torch.cat([sides[0], windows, sides[1]], dim=1)


def frame_of(tokenizer: Any) -> Frame:
    """Return the special tokens around every text, found by reading one with and without them."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for first in range(len(whole) - len(plain) + 1):
        if whole[first : first + len(plain)] == plain:
            return Frame(tuple(whole[:first]), tuple(whole[first + len(plain) :]))
    return Frame()


def windows_of(texts: list[torch.Tensor], tokens: int, window: int) -> torch.Tensor:
    """Return windows of token ids ``[N, window]``, an equal share from each text and evenly spread over it.

    Args:
        texts: token ids ``[T]`` of each text.
        tokens: how many tokens are wanted in all.
        window: tokens per window.

    Raises:
        UsageError: all texts are shorter than one window.
    """
    import torch

    wanted = max(1, tokens // window)
    pieces: list[torch.Tensor] = []
    for index, ids in enumerate(texts):
        share = wanted // len(texts) + (index < wanted % len(texts))
        available = ids[: len(ids) // window * window].view(-1, window)
        if share and len(available):
            chosen = torch.linspace(0, len(available) - 1, min(share, len(available))).long().unique()
            pieces.append(available[chosen])
    if not pieces:
        raise UsageError(f"the text has fewer than {window} tokens", hint="choose a longer --text")
    return torch.cat(pieces)


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int = 48, repetition_penalty: float = 1.0) -> str:
    """Return what a stock model writes after ``prompt``, greedily, in at most ``tokens`` tokens.

    A ``repetition_penalty`` above 1 makes what was written before less probable (arXiv 1909.05858): small models repeat themselves.

    Raises:
        UsageError: the prompt is empty.
    """
    import torch

    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
    if not ids.numel():
        raise UsageError("a prompt is empty", hint="give one that is not, for example --prompt 'Once upon a time'")
    with torch.no_grad():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            pad_token_id=tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text
