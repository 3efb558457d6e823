"""The ranks of a run: how they find each other, exchange numbers, fail together, and notice that one is lost."""

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
    """This process as one of the ranks of a run, and what it exchanges with the others.

    Every rank must call the same methods in the same order: each is a collective operation.
    """

    rank: int
    world_size: int
    device: torch.device  # this rank's

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints for all."""
        return self.rank == 0

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of a tensor over ranks; ``tensor`` is overwritten with it."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def maximum(self, *values: float) -> list[float]:
        """The maximum over ranks of each value, in fp64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return tensor.tolist()

    def sums(self, *values: float) -> list[float]:
        """The sum over ranks of each value, in fp64."""
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def any(self, here: bool) -> bool:
        """Whether something is so on any rank."""
        return bool(self.maximum(here)[0])

    @property
    def reduction(self) -> Reduction:
        """What adds up the sums of auxiliary losses over ranks."""
        return Reduction(self.total, self.world_size) if self.world_size > 1 else Reduction()

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.world_size > 1:
            distributed.barrier()

    def broadcast(self, value: T) -> T:
        """The first rank's value, whatever the others pass."""
        if self.world_size == 1:
            return value
        holder = [value]
        distributed.broadcast_object_list(holder, src=0)
        return holder[0]

    def require_same(self, what: str, value: Any) -> None:
        """Check that all ranks have the same ``value``; ``what`` names it in the error.

        Raises:
            UsageError: they differ; names the first differing key of a dictionary.
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
        """Raise on every rank if one has an error, so that none waits for it forever.

        Args:
            error: what failed on this rank, if anything.

        Raises:
            UpcycleError: this rank's own error, or else that of the first rank that has one.
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
    """Whether this process is rank 0 of a launcher's, or was started alone."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(timeout: float) -> Iterator[Ranks]:
    """Join the process group of the launcher, or make one of this process alone, and leave it when the block ends.

    Raises:
        EnvironmentFault: DeepSpeed is not installed, the launcher's variables are incomplete, or a rank is unreachable.
    """
    deepspeed = import_deepspeed()
    world_size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0) if world_size > 1 else 0
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout)
    joins = not distributed.is_initialized()
    if joins and world_size == 1:
        store = getattr(distributed, "HashStore")()  # noqa: B009 - not exported by its stubs
        distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
        atexit.register(_leave)  # not before: DeepSpeed keeps the group, and the next run in this process uses it again
    elif joins:
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise EnvironmentFault(
                f"this process is one of {world_size} ranks, but {', '.join(missing)} is not set",
                hint="use --nproc, --hostfile or torchrun",
            )
        try:
            distributed.init_process_group(backend, timeout=limit)
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise EnvironmentFault(
                f"rank {rank} of {world_size} did not reach the others at {where} within {timeout:g} s: {_first_line(error)}",
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
        if joins and world_size > 1:
            distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise EnvironmentFault(
            f"{name}={text} in the environment is not a number", hint=f"unset {name}, or use --nproc"
        )
    return int(text)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turn the errors of collectives that fail because a rank is gone into one that says so.

    Raises:
        EnvironmentFault: another rank is gone.
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
            hint="see the other ranks' messages, then run the same command again to continue from the last checkpoint",
        ) from error


def import_deepspeed() -> Any:
    """DeepSpeed's module, made quiet, and on CPUs without its shared-memory extension.

    Compiling that extension takes minutes when it is first used, and it only speeds up sums within one machine. Setting
    ``UPCYCLE_SHARED_MEMORY`` in the environment keeps it.

    Raises:
        EnvironmentFault: DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed logs to stdout, where only results belong, and calls functions that torch has deprecated.
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
    """Send file descriptor 2 to /dev/null: DeepSpeed's import tries compilers, which write their complaints straight to it."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
