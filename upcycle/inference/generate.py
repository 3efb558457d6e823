"""Generates text token by token, and reports which experts read each token in one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.files.locate import locate
from upcycle.inference.offloading.offload import offload
from upcycle.inference.pictures import with_picture
from upcycle.models.experts import run_on_kernels
from upcycle.models.load import load_model


@dataclass(frozen=True)
class Token:
    """One token of the prompt (``prompt`` is true) or of the model's text.

    ``text`` is what the token adds to the text: nothing, while the bytes of a character are incomplete. ``experts`` are those
    that the router chose for the token, the one with the largest routing weight first, and ``weights`` are their routing
    weights; both are empty if the model is dense.
    """

    id: int
    text: str
    experts: list[int]
    weights: list[float]
    prompt: bool


class Writer:
    """Writes text with a model in fp32, one token at a time, on upcycle's kernels where these know the model.

    ``kernels`` says what the model's experts run on (:func:`upcycle.models.experts.run_on_kernels`); None for a dense model. The
    layer whose experts are reported runs its block's own code around them.

    Args:
        name: folder, hub id, ``.gguf`` file or ``demo``; dense or MoE.
        layer: the layer whose experts are reported; by default the middle MoE layer.
        experts: whether experts are reported at all.
        memory: leave routed experts in the model's files, and use at most this much memory for weights, e.g. ``4GB``
            (:func:`~upcycle.inference.offloading.offload.offload`). The text is the same.

    Raises:
        UsageError: the layer has no experts, the model's experts cannot be read, or ``memory`` is too little.
        RefusalError: with ``memory``, the model is dense, or its experts cannot stay in its files.
        EnvironmentFault: the model does not fit in memory.
    """

    def __init__(
        self, name: str, layer: int | None = None, experts: bool = True, memory: str | int | None = None
    ) -> None:
        self._name, self._folder = name, locate(name).path
        self._beside: dict[str, Any] = {}  # what the model reads with the next prompt's tokens
        self.tokenizer: Any = load_tokenizer(self._folder)
        self.offloaded = None if memory is None else offload(name, memory)
        self.model: Any = load_model(name) if self.offloaded is None else self.offloaded.model
        self.kernels = run_on_kernels(self.model) if self.offloaded is None else "eager"
        self.layer: int | None = None
        self.experts = 0
        self._recorder: Any = None
        if experts:
            self._watch(name, layer)
        self._config = text_config(self.model.config)
        self.context: int | None = getattr(self._config, "max_position_embeddings", None)
        self._ends = self._end_tokens()
        #: the seconds that the last prompt took, and those of the ``written`` tokens that were read behind it
        self.prompt_seconds = self.written_seconds = 0.0
        self.written = 0
        #: why the last text ended: ``end`` of text, ``length``, or ``context``
        self.stopped = "length"

    def _watch(self, name: str, layer: int | None) -> None:
        from upcycle.trainers.routing.router_records import capture
        from upcycle.trainers.routing.stock_routers import moe_layers, unread

        if reason := unread(self.model):
            raise UsageError(reason, hint="--no-experts writes the text alone")
        rules = {found.index: found.rule for found in moe_layers(self.model)}
        if not rules:
            if layer is not None:
                raise UsageError(f"{name} is dense: no layer has experts", hint="leave --layer out")
            return
        if layer is not None and layer not in rules:
            listed = ", ".join(map(str, rules))
            raise UsageError(f"layer {layer} of {name} has no experts", hint=f"--layer takes one of: {listed}")
        self.layer = list(rules)[len(rules) // 2] if layer is None else layer
        self.experts = rules[self.layer].experts
        self._recorder = capture(self.model, layers={self.layer})

    def _end_tokens(self) -> set[int]:
        settings = getattr(self.model, "generation_config", None)
        named = (
            getattr(settings, "eos_token_id", None),
            getattr(self._config, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        )
        ends = [end for ids in named for end in (ids if isinstance(ids, list) else [ids])]
        return {end for end in ends if end is not None}

    def encode(self, prompt: str, image: str | Path | None = None) -> list[int]:
        """The token ids of a prompt, with the special tokens that the tokenizer adds.

        Args:
            prompt: the text.
            image: an image file that a model of parts reads with it; its tokens are among those that are returned.

        Raises:
            UsageError: the prompt is empty, the model reads no images, or the file is none.
            EnvironmentFault: the model's processor of images is missing.
        """
        self._beside = {}
        if image is not None:
            self._beside = with_picture(self._name, self._folder, self.model.config, prompt, image)
            self._beside.pop("attention_mask", None)
            of_both: list[int] = self._beside.pop("input_ids")[0].tolist()
            return of_both
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if not prompt or not ids:
            raise UsageError("the prompt is empty", hint="--prompt 'Once upon a time'")
        return ids

    def write(self, ids: Sequence[int], tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[Token]:
        """Yield the prompt's tokens, then at most ``tokens`` that the model writes, each as soon as its experts are known.

        Args:
            ids: the prompt, at least one token.
            tokens: the most tokens to write; an end-of-text token or a full context ends the text earlier.
            temperature: 0 always takes the likeliest token.
            seed: seed for sampling; the same seed writes the same text.

        Raises:
            UsageError: the prompt alone fills the context.
        """
        if self.context is not None and len(ids) >= self.context:
            raise UsageError(f"the prompt has {len(ids):,} tokens, but the model reads at most {self.context:,}")
        rng = torch.Generator().manual_seed(seed)
        pieces = Pieces(self.tokenizer)
        started = perf_counter()
        logits, cache, chosen = self._read(list(ids), None)
        self.prompt_seconds, self.written_seconds, self.written = perf_counter() - started, 0.0, 0
        for position, token in enumerate(ids):
            yield Token(token, pieces.add(token), *chosen[position], True)
        self.stopped = "length"
        for count in range(tokens):
            token = _draw(logits, temperature, rng)
            if token in self._ends:
                self.stopped = "end"
                return
            if self.context is not None and len(ids) + count >= self.context:
                self.stopped = "context"
                return
            started = perf_counter()
            logits, cache, chosen = self._read([token], cache)
            self.written_seconds += perf_counter() - started
            self.written += 1
            last = count == tokens - 1
            yield Token(token, pieces.add(token) + (pieces.rest() if last else ""), *chosen[0], False)

    @torch.no_grad()
    def _read(self, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any, list[tuple[list[int], list[float]]]]:
        """Read tokens: the logits ``[V]`` after the last one, the cache, and each token's experts and routing weights."""
        beside, self._beside = self._beside, {}
        output = self.model(
            input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache, use_cache=True, **beside
        )
        chosen: list[tuple[list[int], list[float]]] = [([], []) for _ in ids]
        if self._recorder:
            (record,) = self._recorder.take()
            weights, order = record.weights.float().sort(dim=-1, descending=True)
            experts = record.experts.gather(-1, order)
            chosen = [
                ([e for e in places if e < self.experts], of_token[: sum(e < self.experts for e in places)])
                for places, of_token in zip(experts.tolist(), weights.tolist(), strict=True)
            ]
        return output.logits[0, -1], output.past_key_values, chosen


class Pieces:
    """Turns tokens into text one by one. The bytes of an incomplete character are kept back until the rest has come."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = self._done = 0  # decoding starts at the first; what lies before the second was shown

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text, shown = self._decode(len(self._ids)), self._decode(self._done)
        if text.endswith("\ufffd"):
            return ""
        self._before, self._done = self._done, len(self._ids)
        return text[len(shown) :]

    def rest(self) -> str:
        """The text of bytes that never became a character, as replacement characters."""
        text, shown = self._decode(len(self._ids)), self._decode(self._done)
        self._before = self._done = len(self._ids)
        return text[len(shown) :]

    def _decode(self, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[self._before : end], skip_special_tokens=True)
        return text


def _draw(logits: torch.Tensor, temperature: float, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=rng))
