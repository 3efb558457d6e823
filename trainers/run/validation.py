"""The loss on every domain's held-out text, measured by all ranks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from upcycle.trainers.data.packed_attention import packed_forward
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.losses.next_token import token_losses
from upcycle.trainers.routing.router_control import RouterControl


def validate(
    engine: Any, held_out: Mapping[str, Sequence[PackedBatch]], ranks: Ranks, control: RouterControl | None = None
) -> dict[str, float]:
    """Mean loss of every domain, in nats per target: of the next token, or of masked ones.

    Args:
        engine: the model, or DeepSpeed's engine around it; in training mode afterwards.
        held_out: every domain's batches, which ranks take in turn.
        ranks: all of them.
        control: what changes its routers, and does so here as it is set for evaluation; ``None``: nothing.
    """
    engine.eval()
    sums: list[float] = []
    with torch.no_grad():
        for batches in held_out.values():
            nats, count = 0.0, 0
            for turn in range(-(-len(batches) // ranks.world_size)):
                place = turn * ranks.world_size + ranks.rank
                counts = place < len(batches)
                # Where weights are divided, every forward pass needs all ranks: one without a batch of its own runs the first.
                batch = on_device(batches[place if counts else 0], ranks.device)
                if control is not None:
                    control.rows(batch.real)
                logits = packed_forward(engine, batch).logits
                if counts:
                    nats += float(token_losses(logits, batch).double().sum())
                    count += int(batch.mask[:, 1:].sum())
            sums += [nats, float(count)]
    engine.train()
    totals = ranks.sums(*sums)
    return {
        name: total / max(1.0, count) for name, total, count in zip(held_out, totals[::2], totals[1::2], strict=True)
    }


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The same batch on ``device``, with its images read."""
    batch = batch.loaded()
    if device.type == "cpu":
        return batch
    shown = batch.pictures.each(lambda part: part.to(device)) if batch.pictures else None
    return replace(batch.each(lambda part: part.to(device)), pictures=shown)
