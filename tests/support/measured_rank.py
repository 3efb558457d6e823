"""One rank of a run that writes down what it sends and what it holds: ``python measured_rank.py RECIPE.yaml OUT.json``.

Of every optimizer step: the bytes that DeepSpeed handed to each kind of collective, and of the last one: the bytes of
weights and of optimizer states, and of everything else that has come since the start, at its largest.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

SMALL = 512  # bytes: norms, flags and counts of tokens are not what a forecast is about
KINDS = {  # DeepSpeed's backend -> which argument holds what is sent, and what it is called here
    "all_reduce": (0, "all_reduce"),
    "all_gather_into_tensor": (0, "all_gather"),
    "reduce_scatter_tensor": (1, "reduce_scatter"),
    "all_to_all_single": (1, "all_to_all"),
}
OTHERS = ("reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "all_reduce_coalesced")


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of every storage by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def everything() -> dict[int, int]:
    gc.collect()
    return storages(each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type == "cpu")


class Watch:
    """What one rank did."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self.held = {"weights": 0, "optimizer": 0, "gathered": 0, "rest": 0}
        self.before: dict[int, int] = {}
        self.engine: Any = None

    def count(self, name: str, payload: int, group: Any) -> None:
        if payload > SMALL and distributed.get_world_size(group) > 1:
            self.now[name] = self.now.get(name, 0.0) + payload
            if name in ("all_reduce", "reduce_scatter"):  # of gradients, when activations are gone
                self.hold()

    def hold(self) -> None:
        if self.engine is None:
            return
        parameters = list(self.engine.module.parameters())
        kept = [own for own in parameters if getattr(own, "ds_persist", True)]
        kept += [own.ds_tensor for own in parameters if hasattr(own, "ds_tensor")]
        weights = storages(kept)
        gathered = {key: size for key, size in storages(parameters).items() if key not in weights}
        outer = self.engine.optimizer
        inner = getattr(outer, "optimizer", outer)
        states = [each for own in inner.state.values() for each in own.values() if torch.is_tensor(each)]
        optimizer = storages([*states, *inner.state])
        rest = everything().items() - self.before.items()
        own = {
            "weights": sum(weights.values()),
            "optimizer": sum(size for key, size in optimizer.items() if key not in weights),
            "gathered": sum(gathered.values()),
            "rest": sum(size for key, size in rest if key not in {**weights, **gathered, **optimizer}),
        }
        self.held = {name: max(self.held[name], size) for name, size in own.items()}


def watch_collectives(watch: Watch) -> None:
    """Count what goes through DeepSpeed's backend, which this project's own code does not use."""
    from deepspeed.comm.torch import TorchBackend

    def wrap(name: str, which: int | None, kind: str) -> None:
        own = getattr(TorchBackend, name)

        def counted(self: Any, *arguments: Any, **named: Any) -> Any:
            told = (*arguments, *named.values())
            given = [each for each in told if isinstance(each, torch.Tensor)]
            group = next((each for each in told if isinstance(each, distributed.ProcessGroup)), None)
            sent = given[which or 0] if given else torch.empty(SMALL)
            watch.count(kind, sent.numel() * sent.element_size(), group)
            return own(self, *arguments, **named)

        setattr(TorchBackend, name, counted)

    for name, (which, kind) in KINDS.items():
        wrap(name, which, kind)
    for name in OTHERS:
        wrap(name, None, f"unexpected {name}")


def main(recipe: Path, out: Path) -> None:
    from upcycle.trainers.distributed.ranks import import_deepspeed

    import_deepspeed()
    from upcycle.trainers.run import step as stepping
    from upcycle.trainers.run.loop import train

    watch = Watch()
    watch_collectives(watch)
    own_step = stepping.Stepper.step

    def step(self: Any, engine: Any, batches: Any, progress: float) -> Any:
        watch.now = {}
        watch.engine = engine if watch.steps else None  # the first step has no states yet
        result = own_step(self, engine, batches, progress)
        watch.steps.append(watch.now)
        watch.now, watch.engine = {}, None
        return result

    stepping.Stepper.step = step  # type: ignore[method-assign]
    watch.before = everything()
    train(recipe)
    out.write_text(json.dumps({"steps": watch.steps, "held": watch.held}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
