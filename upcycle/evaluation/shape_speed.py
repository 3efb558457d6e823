"""Times models of given shapes beside the dense parent, in turns: how long a model takes depends on its shapes, not on its weights.

Every model is a stock one with random weights, in one process, so that whatever slows the machine slows all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from upcycle.kernels.entry.transformers_blocks import use_kernels
from upcycle.models.experts import has_experts, use_experts
from upcycle.models.random_model import random_model
from upcycle.progress import SILENT, Progress

PROMPT, GENERATE, ROUNDS = 256, 32, 5
STOCK, OWN = "grouped_mm", "upcycle"
_TIMED_TOKENS = 8  # of the generated ones; each takes as long as the others but for a longer context
_MOST_BYTES = 1 << 30  # layers of up to so many bytes are all timed
_LEAST_BYTES = 1 << 28  # of the layers that are timed otherwise, so that they fill no cache
ShapeKey = tuple[str, str]  # a name, and how its sparse blocks are computed: STOCK or OWN; a dense model is under both


@dataclass(frozen=True)
class Times:
    """Holds seconds: of reading the prompt, and of one further token (per step, whatever the batch).

    They are the least of all rounds: what else a machine does can only add to a time, and differences of times are taken.
    """

    prefill: float
    decode: float

    def request(self, generate: int = GENERATE) -> float:
        """Return the seconds of a whole request: the prompt, and ``generate`` tokens after it."""
        return self.prefill + generate * self.decode

    def over(self, other: Times) -> Times:
        """Return these times relative to another model's."""
        return Times(self.prefill / other.prefill, self.decode / other.decode)


def measure_shapes(
    configs: Mapping[str, Mapping[str, Any]],
    *,
    prompt: int = PROMPT,
    batch: int = 1,
    rounds: int = ROUNDS,
    progress: Progress = SILENT,
) -> dict[ShapeKey, Times]:
    """Time models of some configurations in fp32 on the CPU.

    Args:
        configs: complete ``config.json`` contents, by name.
        prompt: tokens of each prompt, fewer where a context is shorter.
        batch: sequences at a time.
        rounds: how often each model is timed, after a first pass that is not.
        progress: receives the progress.
    """
    contexts = [config.get("max_position_embeddings") or prompt + _TIMED_TOKENS for config in configs.values()]
    length = max(1, min(prompt, *(context - _TIMED_TOKENS for context in contexts)))
    timed: list[_Timed] = []
    with progress.phase("loading shapes", len(configs)), torch.no_grad():
        for name, config in configs.items():
            model = random_model(config, torch.float32)
            timed += [_Timed(name, model, how) for how in ((STOCK, OWN) if has_experts(model) else (STOCK,))]
            progress.advance()
    found: dict[ShapeKey, list[tuple[float, float]]] = {(each.name, each.how): [] for each in timed}
    with progress.phase("timing shapes", rounds + 1), torch.no_grad():
        for number in range(rounds + 1):
            for each in timed if number % 2 else reversed(timed):
                seconds = each.run(length, batch)
                if number:
                    found[each.name, each.how].append(seconds)
            progress.advance()
    times = {key: Times(*(min(column) for column in zip(*runs, strict=True))) for key, runs in found.items()}
    dense = {(name, OWN): times[name, STOCK] for name in configs if (name, OWN) not in times}
    return times | dense


class _Timed:
    """Runs one model with one implementation of experts; two implementations share the weights."""

    def __init__(self, name: str, model: Any, how: str) -> None:
        self.name, self.how = name, how
        self._model = model

    def run(self, prompt: int, batch: int) -> tuple[float, float]:
        """Return the seconds of reading a prompt and of one more token."""
        if has_experts(self._model):
            use_kernels(self._model, off=self.how == STOCK)
            use_experts(self._model, self.how)
        ids = torch.arange(prompt + _TIMED_TOKENS) % self._model.config.vocab_size
        rows = ids.expand(batch, -1)
        start = perf_counter()
        output = self._model(rows[:, :prompt], use_cache=True, logits_to_keep=1)
        read = perf_counter()
        for position in range(prompt, prompt + _TIMED_TOKENS):
            token = rows[:, position : position + 1]
            output = self._model(token, past_key_values=output.past_key_values, use_cache=True)
        return read - start, (perf_counter() - read) / _TIMED_TOKENS


def relative_times(
    dense: Mapping[str, Any],
    shapes: Mapping[str, tuple[Mapping[str, Any], int]],
    layer_bytes: int,
    *,
    batch: int = 1,
    rounds: int = ROUNDS,
    progress: Progress = SILENT,
) -> tuple[Times, dict[ShapeKey, Times]]:
    """Return the dense parent's times in seconds, and those of the shapes relative to it.

    A small model is timed whole. Of others two depths are timed, from which follows the time of all layers. Either way, all layers
    of what is timed have the shape, and a model in which some stay dense is between that and its parent.

    Args:
        dense: the parent's ``config.json``.
        shapes: by name, the ``config.json`` of a model of which every layer has the shape, and how many layers of the parent get it.
        layer_bytes: of one dense layer in fp32.
        batch: sequences at a time.
        rounds: how often each model is timed.
        progress: receives the progress.
    """
    layers = dense["num_hidden_layers"]
    deep = layers if layers * layer_bytes <= _MOST_BYTES else min(layers, max(2, -(-_LEAST_BYTES // layer_bytes)))
    depths = [layers] if deep == layers else [deep // 2, deep]
    configs = {
        f"{name} {depth}": first_layers(config, depth)
        for name, config in {"": dense, **{name: config for name, (config, _) in shapes.items()}}.items()
        for depth in depths
    }
    found = measure_shapes(configs, batch=batch, rounds=rounds, progress=progress)

    def seconds(part: str, name: str, how: str) -> float:
        """Return the seconds of a model of which every layer has the shape."""
        more = getattr(found[f"{name} {deep}", how], part)
        if deep == layers:
            return float(more)
        less = getattr(found[f"{name} {deep // 2}", how], part)
        return float(more + (layers - deep) * (more - less) / (deep - deep // 2))

    def ratio(part: str, name: str, how: str, count: int) -> float:
        """Return the time of a model of which ``count`` layers have the shape, relative to the parent's."""
        parent = seconds(part, "", STOCK)
        share: float = count / layers
        return 1 + share * (seconds(part, name, how) - parent) / parent

    parts = ("prefill", "decode")
    relative = {
        (name, how): Times(*(ratio(part, name, how, count) for part in parts))
        for name, (_, count) in shapes.items()
        for how in (STOCK, OWN)
    }
    return Times(*(seconds(part, "", STOCK) for part in parts)), relative


def first_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return a configuration with the first ``layers`` layers alone: lists with one entry per layer are cut, too."""
    whole = config["num_hidden_layers"]
    shorter = {
        key: value[:layers] if isinstance(value, list) and len(value) == whole else value
        for key, value in config.items()
    }
    return {**shorter, "num_hidden_layers": layers}
