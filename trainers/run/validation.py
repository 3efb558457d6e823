"""The loss on every domain's held-out text, all ranks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from upcycle.trainers.data.batches import PackedBatch
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.run.step import next_token_losses


def validate(
    engine: Any, held_out: Mapping[str, Sequence[PackedBatch]], ranks: Ranks, control: RouterControl | None = None
) -> dict[str, float]:
    """Mean nats per target of every domain, of the function that is trained: with what its ``control`` does in evaluation.

    Ranks take batches in turn, and each runs as many as the others: with divided weights a forward pass needs all of them.
    """
    engine.eval()
    sums: list[float] = []
    with torch.no_grad():
        for batches in held_out.values():
            nats, count = 0.0, 0
            for turn in range(-(-len(batches) // ranks.world_size)):
                place = turn * ranks.world_size + ranks.rank
                counts = place < len(batches)
                batch = on_device(batches[place if counts else 0], ranks.device)
                if control is not None:
                    control.rows(batch.real)
                logits = engine(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
                if counts:
                    mask = batch.mask[:, 1:]
                    nats += float((next_token_losses(logits, batch.ids) * mask).double().sum())
                    count += int(mask.sum())
            sums += [nats, float(count)]
    engine.train()
    totals = ranks.sums(*sums)
    return {
        name: total / max(1.0, count) for name, total, count in zip(held_out, totals[::2], totals[1::2], strict=True)
    }


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """A batch where the model is."""
    if device.type == "cpu":
        return batch
    return PackedBatch(batch.ids.to(device), batch.mask.to(device), batch.positions.to(device), batch.domains)
