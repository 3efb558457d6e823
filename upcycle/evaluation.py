"""Perplexity of any model, and how evenly a MoE uses its experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.progress import SILENT, Progress
from upcycle.runtime import available_memory, quiet_transformers, use_eager_experts
from upcycle.sources import locate
from upcycle.tensor_files import SafetensorsFolder
from upcycle.text import DEMO_TEXTS, encode, load_tokenizer, read_text

_BATCH_LOGIT_BYTES = 1 << 28


@dataclass(frozen=True)
class TextResult:
    """One model on one text: ``nats_per_token`` is the mean negative log likelihood of ``predicted`` tokens."""

    text: str
    tokens: int
    predicted: int
    nats_per_token: float
    perplexity: float
    reference_nats_per_token: float | None = None
    reference_perplexity: float | None = None


@dataclass(frozen=True)
class LayerLoad:
    """How one MoE layer spread the (token, expert) pairs: ``load`` sums to 1, ``entropy`` is relative to uniform."""

    layer: int
    load: list[float]
    max_over_mean: float
    entropy: float
    dead_experts: list[int]


@dataclass(frozen=True)
class Evaluation:
    """Results for one model. ``as_dict`` has the documented JSON keys."""

    model: str
    reference: str | None
    window: int
    stride: int
    texts: list[TextResult]
    layers: list[LayerLoad]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def evaluate(
    model: str | Path,
    *,
    text: str | Sequence[str] | None = None,
    reference: str | Path | None = None,
    window: int = 512,
    stride: int | None = None,
    tokens: int | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Measure perplexity in fp32 with strided windows, and the load of every expert.

    Each window of ``window`` tokens is moved by ``stride`` (default: half a window) and only tokens not yet scored
    count, so all but the first have at least ``window - stride`` tokens of context.

    Args:
        model: folder, hub id, ``.gguf`` file or ``demo``; dense or MoE.
        text: UTF-8 files, or ``prose`` / ``code``; default: both embedded validation texts.
        reference: another model with the same tokenizer, measured on the same tokens.
        window: tokens per window, at most the model's context.
        stride: tokens between windows.
        tokens: at most this many tokens of each text.
        progress: where to report.

    Raises:
        UsageError: a missing text or a stride that is not below the window.
        EnvironmentFault: the model does not fit in memory.
    """
    names = [text] if isinstance(text, str) else list(text or DEMO_TEXTS)
    with progress.phase("loading text and model", 2):
        tokenizer = load_tokenizer(locate(str(model)).path)
        encoded = {name: encode(tokenizer, read_text(name))[:tokens] for name in names}
        progress.advance()
        runner = _Runner(str(model), window, stride)
        progress.advance()
    with load_counts(runner.model) as counts:
        measured = {name: runner.loss(ids, progress, name) for name, ids in encoded.items()}
    layers = [_layer_load(layer, count) for layer, count in counts.items()]
    compared: dict[str, float] = {}
    if reference:
        del runner.model
        other = _Runner(str(reference), runner.window, runner.stride)
        _same_vocabulary(tokenizer, load_tokenizer(locate(str(reference)).path), str(model), str(reference))
        compared = {name: other.loss(ids, progress, f"{name} (reference)")[0] for name, ids in encoded.items()}
    texts = [
        TextResult(
            text=name,
            tokens=len(encoded[name]),
            predicted=predicted,
            nats_per_token=loss,
            perplexity=math.exp(loss),
            reference_nats_per_token=compared.get(name),
            reference_perplexity=math.exp(compared[name]) if name in compared else None,
        )
        for name, (loss, predicted) in measured.items()
    ]
    return Evaluation(str(model), str(reference) if reference else None, runner.window, runner.stride, texts, layers)


def _same_vocabulary(first: Any, second: Any, model: str, reference: str) -> None:
    if first.get_vocab() != second.get_vocab():
        raise UsageError(
            f"{model} and {reference} have different vocabularies; perplexity per token cannot be compared",
            hint="compare models that share a tokenizer",
        )


class _Runner:
    """A model in memory and its windows."""

    def __init__(self, name: str, window: int, stride: int | None) -> None:
        self.model = _load(name)
        self.window = min(window, self.model.config.max_position_embeddings)
        self.stride = stride or max(1, self.window // 2)
        if not 0 < self.stride < self.window:
            raise UsageError(f"the stride ({self.stride}) must be at least 1 and below the window ({self.window})")

    def loss(self, ids: torch.Tensor, progress: Progress, title: str) -> tuple[float, int]:
        """Mean negative log likelihood in nats, and the number of predicted tokens."""
        if len(ids) < 2:
            raise UsageError(f"{title}: fewer than two tokens", hint="give a longer --text")
        starts = list(range(0, max(1, len(ids) - self.window + self.stride), self.stride))
        per_batch = max(1, _BATCH_LOGIT_BYTES // (4 * self.window * self.model.config.vocab_size))
        total, predicted = 0.0, 0
        with progress.phase(f"reading {title}", len(starts)), torch.no_grad():
            for first in range(0, len(starts), per_batch):
                for batch in _equal_lengths(
                    [ids[start : start + self.window] for start in starts[first : first + per_batch]]
                ):
                    logits = self.model(batch, use_cache=False).logits
                    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")
                    for row, loss in enumerate(losses):
                        is_first = predicted == 0 and row == 0
                        # The last window may be short; its new tokens are those after the overlap.
                        new = loss if is_first else loss[self.window - self.stride - 1 :]
                        total += new.double().sum().item()
                        predicted += len(new)
                    progress.advance(len(batch))
        return total / predicted, predicted


def _equal_lengths(windows: list[torch.Tensor]) -> list[torch.Tensor]:
    full = [window for window in windows if len(window) == len(windows[0])]
    rest = [window[None] for window in windows[len(full) :]]
    return [torch.stack(full), *rest]


def _load(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    path = locate(name).path
    if path.is_file():
        from upcycle.checkpoint import DenseCheckpoint
        from upcycle.runtime import dense_model

        return dense_model(DenseCheckpoint.open(name), "float32", streamed=False).model
    needed = 4 * sum(spec.elements for spec in SafetensorsFolder(path).specs.values())
    if needed > 0.9 * available_memory():
        raise EnvironmentFault(
            f"{name} needs about {needed / 1e9:.0f} GB in fp32, and {available_memory() / 1e9:.0f} GB are available",
            hint="evaluate on a machine with more memory",
        )
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"transformers cannot load {name}: {str(error).splitlines()[0]}") from None
    return use_eager_experts(model.eval())


@contextmanager
def load_counts(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Count what every router chooses: layer -> int64 ``[E]``. A stock router returns (logits, weights, indices)."""
    counts: dict[int, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        named = (module for name, module in layer.named_modules() if name.endswith((".gate", ".router")))
        router = next((module for module in named if hasattr(module, "top_k")), None)
        if router is None:
            continue
        counts[index] = torch.zeros(router.num_experts, dtype=torch.int64)

        def count(_: Any, __: Any, output: Any, index: int = index) -> None:
            counts[index] += torch.bincount(output[2].flatten(), minlength=len(counts[index]))

        hooks.append(router.register_forward_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _layer_load(layer: int, counts: torch.Tensor) -> LayerLoad:
    load = counts.double() / counts.sum()
    entropy = -torch.xlogy(load, load).sum().item()
    return LayerLoad(
        layer=layer,
        load=load.tolist(),
        max_over_mean=(load.max() * len(load)).item(),
        entropy=entropy / math.log(len(load)) if len(load) > 1 else 1.0,
        dead_experts=torch.nonzero(counts == 0).flatten().tolist(),
    )
