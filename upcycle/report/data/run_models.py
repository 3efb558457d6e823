"""Runs the model and its parent once over all texts, and keeps the measurements that the sections need."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from upcycle.architectures.module_paths import text_config
from upcycle.errors import UpcycleError, UsageError
from upcycle.formatting import duration
from upcycle.progress import SILENT, Progress
from upcycle.report.data.models import Models
from upcycle.report.data.routing import Choices
from upcycle.report.data.subject import reason_of
from upcycle.report.data.texts import Domain
from upcycle.text.windows import continuation
from upcycle.trainers.routing.router_records import capture
from upcycle.trainers.routing.stock_routers import MoeLayer, moe_layers, unread
from upcycle.verification.verdict import Totals

_BATCH_LOGIT_BYTES = 1 << 26
SAMPLE_TOKENS = 256


@dataclass
class Measurements:
    """Holds what was measured in one run of both models.

    Attributes:
        totals: domain -> its totals, compared with the parent or, where there is none, with the model itself.
        layers: the MoE layers.
        choices: the routers' choices; None where there are none.
        no_routing: why there are none.
        inputs: layer -> a sample of the inputs of its MoE block, ``[S, d]``.
    """

    totals: dict[str, Totals]
    layers: list[MoeLayer]
    choices: Choices | None
    no_routing: str | None
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)


def run_models(models: Models, domains: Sequence[Domain], progress: Progress = SILENT) -> Measurements:
    """Run both models on every window of every domain."""
    model = models.model.model
    try:
        layers, why = moe_layers(model), unread(model)
    except UpcycleError as error:
        layers, why = [], reason_of(error)
    totals: dict[str, Totals] = {domain.name: Totals() for domain in domains}
    experts: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    inputs: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    wanted = -(-SAMPLE_TOKENS // len(domains))
    if progress.listens:
        _foretell(models, domains, progress)
    recorder = capture(model) if layers else None
    with progress.phase("reading texts", sum(len(domain.windows) for domain in domains)):
        for domain in domains:
            first = True
            for batch in domain.windows.split(_windows_per_batch(domain.windows, model)):
                with _sampled(layers, inputs, wanted if first else 0):
                    logits = models.model.logits(batch)
                first = False
                for record in recorder.take() if recorder else []:
                    experts[record.layer].append(record.experts.to(torch.int16))
                expected = models.reference.logits(batch) if models.reference else logits
                if expected.shape != logits.shape:
                    raise UsageError("the model and its parent have vocabularies of different sizes")
                totals[domain.name].add(batch, expected, logits)
                progress.advance(len(batch))
    if recorder:
        recorder.close()
    choices = None
    if layers:
        choices = Choices(
            experts={index: torch.cat(parts) for index, parts in experts.items()},
            counts={layer.index: layer.rule.experts for layer in layers},
            tokens=torch.cat([domain.windows.flatten() for domain in domains]),
            domains=torch.cat([torch.full((d.windows.numel(),), i) for i, d in enumerate(domains)]),
            names=[domain.name for domain in domains],
        )
    return Measurements(totals, layers, choices, why, {index: torch.cat(parts) for index, parts in inputs.items()})


def _foretell(models: Models, domains: Sequence[Domain], progress: Progress) -> None:
    """Say about how long all texts take, from how long one window takes."""
    some = domains[0].windows[:1]
    took = 0.0
    for _ in range(2):  # the first time, much happens for the only time
        started = time.monotonic()
        for side in (models.model, models.reference):
            if side is not None:
                side.logits(some)
        took = time.monotonic() - started
    tokens = sum(domain.windows.numel() for domain in domains)
    both = "both models" if models.reference else "the model"
    progress.tell(f"reading {tokens:,} tokens with {both}: about {duration(took * tokens / some.numel())}")


def _windows_per_batch(windows: torch.Tensor, model: Any) -> int:
    return max(1, int(_BATCH_LOGIT_BYTES // (4 * windows.shape[1] * text_config(model.config).vocab_size)))


@contextmanager
def _sampled(layers: Sequence[MoeLayer], inputs: dict[int, list[torch.Tensor]], wanted: int) -> Iterator[None]:
    """Add ``wanted`` evenly spaced inputs of every MoE block to ``inputs`` while the ``with`` block runs."""

    def keep(index: int, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        inputs[index].append(rows[torch.linspace(0, len(rows) - 1, min(wanted, len(rows))).long()].clone())

    hooks = [
        layer.block.register_forward_pre_hook(lambda _, args, index=layer.index: keep(index, args[0]))
        for layer in (layers if wanted else ())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write_samples(models: Models, tokenizer: Any, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return both models' greedy continuations of each prompt; ``same`` says whether they agree, None without a parent."""
    samples = []
    for prompt in prompts:
        text = continuation(models.model.model, tokenizer, prompt)
        before = continuation(models.reference.model, tokenizer, prompt) if models.reference else None
        same = None if before is None else before == text
        samples.append({"prompt": prompt, "before": before, "after": text, "same": same})
    return samples
