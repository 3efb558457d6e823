"""The ranks of a run: how they find each other, add up, agree, and what a lost one looks like."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.trainers.distributed.reduction import Reduction

T = TypeVar("T")
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over ranks, on each of them; ``tensor`` is overwritten."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def maximum(self, *values: float) -> list[float]:
        """The largest of every value over ranks, in fp64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return tensor.tolist()

    def sums(self, *values: float) -> list[float]:
        """The sum of every value over ranks, in fp64."""
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    @property
    def reduction(self) -> Reduction:
        """For auxiliary losses."""
        return Reduction(self.total, self.world_size) if self.world_size > 1 else Reduction()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            distributed.barrier()

    def broadcast(self, value: T) -> T:
        """The first rank's value, on all."""
        if self.world_size == 1:
            return value
        found = [value]
        distributed.broadcast_object_list(found, src=0)
        return found[0]

    def require_same(self, what: str, value: Any) -> None:
        """Make sure that all ranks were given the same.

        Raises:
            UsageError: they were not.
        """
        if self.world_size == 1:
            return
        everyone: list[Any] = [None] * self.world_size
        distributed.all_gather_object(everyone, value)
        other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
        if other is not None:
            first, theirs = everyone[0], everyone[other]
            if isinstance(first, dict):
                key = next(key for key in first if first[key] != theirs.get(key))
                what, first, theirs = f"{what} ({key})", first[key], theirs.get(key)
            raise UsageError(
                f"ranks disagree about {what}: rank 0 has {first}, rank {other} has {theirs}",
                hint="give every rank the same recipe, files and versions",
            )

    def raise_together(self, error: BaseException | None) -> None:
        """Raise on every rank what failed on one, so that none waits for it forever.

        Raises:
            UpcycleError: this rank's own error, or that of the first rank that has one.
        """
        if self.world_size > 1:
            everyone: list[Any] = [None] * self.world_size
            distributed.all_gather_object(everyone, _described(error))
            found = next(((rank, theirs) for rank, theirs in enumerate(everyone) if theirs), None)
            if found and error is None:
                rank, (kind, message, hint) = found
                raise kind(f"rank {rank}: {message}", hint=hint)
        if error is not None:
            raise error


def _described(error: BaseException | None) -> tuple[type[UpcycleError], str, str | None] | None:
    if error is None:
        return None
    if isinstance(error, UpcycleError):
        return type(error), error.message, error.hint
    return UpcycleError, f"{type(error).__name__}: {error}", None


def first_rank() -> bool:
    """Whether this process is the rank that speaks for all, or alone."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """Join the process group of the launcher, or make one of this process alone; it is left at the end.

    Raises:
        EnvironmentFault: DeepSpeed is not installed, the launcher's variables are incomplete, or a rank is unreachable.
    """
    deepspeed = import_deepspeed()
    world_size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0) if world_size > 1 else 0
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout)
    mine = not distributed.is_initialized()
    if mine and world_size == 1:
        store = getattr(distributed, "HashStore")()  # noqa: B009 - not exported by its stubs
        distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        atexit.register(_leave)  # not sooner: DeepSpeed remembers the group, and the next run in this process uses it
    elif mine:
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise EnvironmentFault(
                f"one of {world_size} ranks, but {', '.join(missing)} is not set",
                hint="use --nproc, --hostfile or torchrun",
            )
        try:
            distributed.init_process_group(backend, timeout=limit)
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise EnvironmentFault(
                f"rank {rank} of {world_size} found no other at {where} within {timeout:g} s: {_first_line(error)}",
                hint="start all ranks, and check that they can reach that address",
            ) from None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    else:
        device = torch.device("cpu")
    try:
        deepspeed.init_distributed()
        with lost_ranks():
            yield Ranks(rank, world_size, device)
    finally:
        if mine and world_size > 1:
            distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise EnvironmentFault(f"{name}={text} in the environment is no number", hint=f"unset {name}, or use --nproc")
    return int(text)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Say it plainly when a collective fails because a rank is gone.

    Raises:
        EnvironmentFault: a rank is gone.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        signs = ("connection closed", "connection reset", "timed out", "broken pipe", "nccl", "no progress")
        if not isinstance(error, distributed.DistError) and not any(sign in text for sign in signs):
            raise
        raise EnvironmentFault(
            f"another rank was lost: {_first_line(error)}",
            hint="look at the other ranks' messages; the same command continues from the last checkpoint",
        ) from error


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and on CPUs without its shared-memory extension.

    That extension is compiled for minutes when first used, and is only a faster way to add up on one machine.

    Raises:
        EnvironmentFault: it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It sets a handler that writes to stdout, where only results belong, and calls what torch has newer names for.
    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", message=r"`torch\.", category=kind)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        with _compilers_silenced():
            import deepspeed
    except ImportError:
        raise EnvironmentFault("training needs DeepSpeed", hint="pip install 'upcycle[train]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available() and not os.environ.get("UPCYCLE_SHARED_MEMORY"):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _compilers_silenced() -> Iterator[None]:
    """When it is imported, DeepSpeed tries what it could compile here, and compilers complain on stderr itself."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
