"""Times models of given shapes beside the dense parent, in turns: how long a model takes depends on its shapes, not on its weights.

Every model is a stock one with random weights, in one process, so that whatever slows the machine slows all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from upcycle.architectures.module_paths import text_config
from upcycle.architectures.usual_keys import own_key, usual_keys
from upcycle.errors import EnvironmentFault
from upcycle.formatting import size
from upcycle.hardware.clocks import clock
from upcycle.hardware.memory import available_memory
from upcycle.kernels.entry.transformers_blocks import use_kernels
from upcycle.models.experts import has_experts, use_experts
from upcycle.models.random_model import WeightPool, random_model
from upcycle.progress import SILENT, Progress

PROMPT, GENERATE, ROUNDS = 256, 32, 5
STOCK, OWN = "grouped_mm", "upcycle"
_TURNS, _TOKENS = 4, 2  # after each prompt, all models write two tokens, four times in turn
_MOST_BYTES = 1 << 30  # layers of up to so many bytes are all timed
_LEAST_BYTES = 1 << 28  # of the layers that are timed otherwise, so that they fill no cache
ShapeKey = tuple[str, str]  # a name, and how its sparse blocks are computed: STOCK or OWN; a dense model is under both


@dataclass(frozen=True)
class Times:
    """Holds seconds: of reading the prompt, and of one further token (per step, whatever the batch)."""

    prefill: float
    decode: float

    def request(self, generate: int = GENERATE) -> float:
        """Return the seconds of a whole request: the prompt, and ``generate`` tokens after it."""
        return self.prefill + generate * self.decode


def prompt_length(configs: Mapping[str, Mapping[str, Any]], prompt: int = PROMPT) -> int:
    """Return the tokens of a prompt that every model has room for, and for what is written after it."""
    written = _TURNS * _TOKENS
    contexts = [usual_keys(config).get("max_position_embeddings") or prompt + written for config in configs.values()]
    return max(1, min(prompt, *(context - written for context in contexts)))


def measure_shapes(
    configs: Mapping[str, Mapping[str, Any]],
    *,
    prompt: int = PROMPT,
    batch: int = 1,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
    progress: Progress = SILENT,
) -> dict[ShapeKey, Times]:
    """Time models of some configurations on the CPU, and return the medians.

    Args:
        configs: complete ``config.json`` contents, by name.
        prompt: tokens of each prompt, fewer where a context is shorter.
        batch: sequences at a time.
        rounds: how many prompts each model is timed with, after one that is not.
        dtype: that of weights and states.
        progress: receives the progress.

    Raises:
        EnvironmentFault: the models do not fit in memory together.
    """
    length = prompt_length(configs, prompt)
    timed: list[_Timed] = []
    pool = WeightPool()
    with progress.phase("loading shapes", len(configs)), torch.no_grad():
        for name, config in configs.items():
            model = random_model(config, dtype, pool, _check_room)
            timed += [_Timed(name, model, how) for how in ((STOCK, OWN) if has_experts(model) else (STOCK,))]
            progress.advance()
    with progress.phase("timing shapes", rounds + 1), torch.no_grad():
        for number in range(rounds + 1):
            turns = timed if number % 2 else timed[::-1]
            for each in turns:
                each.read(length, batch)
            for _ in range(_TURNS):
                for each in turns:
                    each.write()
            if number == 0:
                for each in timed:
                    each.forget()
            progress.advance()
    times = {(each.name, each.how): each.times for each in timed}
    dense = {(name, OWN): times[name, STOCK] for name in configs if (name, OWN) not in times}
    return times | dense


def _check_room(needed: int) -> None:
    """Refuse weights that do not fit beside the others."""
    free = available_memory()
    if needed > free:
        raise EnvironmentFault(
            f"the shapes that are timed beside each other need {size(needed)} more, and {size(free)} are free",
            hint="fewer fractions (--active 0.5), free memory, or --no-time",
        )


class _Timed:
    """Runs one model with one implementation of sparse blocks; two implementations share the weights."""

    def __init__(self, name: str, model: Any, how: str) -> None:
        self.name, self.how = name, how
        self._model, self._clock = model, clock()
        self._prefill: list[float] = []
        self._decode: list[float] = []
        self._past: Any = None
        self._next = torch.zeros(1, 1, dtype=torch.long)

    def read(self, prompt: int, batch: int) -> None:
        """Time the reading of a prompt."""
        ids = (torch.arange(prompt) % text_config(self._model.config).vocab_size).expand(batch, -1)
        self._next = ids[:, -1:]
        self._past, seconds = self._run(ids, None)
        self._prefill.append(seconds)

    def write(self) -> None:
        """Time some tokens after it."""
        for _ in range(_TOKENS):
            self._past, seconds = self._run(self._next, self._past)
            self._decode.append(seconds)

    def forget(self) -> None:
        """Forget the times of a first pass, in which much happens for the only time."""
        self._prefill.clear()
        self._decode.clear()

    @property
    def times(self) -> Times:
        """The medians."""
        return Times(median(self._prefill), median(self._decode))

    def _run(self, ids: torch.Tensor, past: Any) -> tuple[Any, float]:
        if has_experts(self._model):
            use_kernels(self._model, off=self.how == STOCK)
            use_experts(self._model, self.how)
        start = self._clock()
        output = self._model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return output.past_key_values, self._clock() - start


def relative_times(
    dense: Mapping[str, Any],
    shapes: Mapping[str, tuple[Mapping[str, Any], int]],
    layer_bytes: int,
    *,
    batch: int = 1,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
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
        dtype: that of weights and states.
        progress: receives the progress.
    """
    layers = usual_keys(dense)["num_hidden_layers"]
    deep = layers if layers * layer_bytes <= _MOST_BYTES else min(layers, max(2, -(-_LEAST_BYTES // layer_bytes)))
    depths = [layers] if deep == layers else [deep // 2, deep]
    configs = {
        f"{name} {depth}": first_layers(config, depth)
        for name, config in {"": dense, **{name: config for name, (config, _) in shapes.items()}}.items()
        for depth in depths
    }
    found = measure_shapes(configs, batch=batch, rounds=rounds, dtype=dtype, progress=progress)

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
    if isinstance(text := config.get("text_config"), Mapping):
        return {**config, "text_config": first_layers(text, layers)}
    whole = usual_keys(config)["num_hidden_layers"]
    shorter = {
        key: value[:layers] if isinstance(value, list) and len(value) == whole else value
        for key, value in config.items()
    }
    return {**shorter, own_key(config, "num_hidden_layers"): layers}
