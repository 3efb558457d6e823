"""Lets a model write the text that it is calibrated on, token by token, many windows side by side.

The idea is that of LLM-QAT (arXiv 2305.17888, section 3.1) and of self-calibration (arXiv 2410.17170): text that is sampled from
a model is of all the kinds that the model knows, and no file is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.calibration.repetition import judge, repetition
from upcycle.errors import CheckpointError
from upcycle.files.atomic_files import write_whole
from upcycle.models.load import load_model
from upcycle.planning.own_text import rows_at_once
from upcycle.progress import Progress

TEMPERATURE = 1.0  # the model's own distribution
_TENSOR = "token_ids"


@dataclass(frozen=True)
class OwnText:
    """Says how a model writes text: all that decides the tokens, beside its weights.

    Attributes:
        windows: how many windows it writes, ``N``.
        window: tokens per window, ``W``.
        seed: seed of the first tokens and of all draws.
        vocabulary: only the first so many tokens are drawn; a model may have more rows than its tokenizer has tokens.
        special: special tokens, none of which begins a window.
        temperature: of all draws but the first.
    """

    windows: int
    window: int
    seed: int
    vocabulary: int
    special: tuple[int, ...] = ()
    temperature: float = TEMPERATURE

    @property
    def about(self) -> dict[str, Any]:
        """What ``upcycle.json`` says about it, as plain data."""
        content = asdict(self)
        return {key: content[key] for key in ("windows", "window", "seed", "temperature")} | {"first": "random token"}


def with_own_text(
    wanted: OwnText, read: torch.Tensor | None, model: Path, kept: Path, progress: Progress
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return windows that the model writes, evenly mixed with those that were read, int64 ids ``[N, W]``.

    Args:
        wanted: the windows to write.
        read: windows of files, ids ``[M, W]``; None: there are none.
        model: the model's folder or ``.gguf`` file.
        kept: a file that keeps what is written; a run that was stopped continues from it.
        progress: where to report.

    Returns:
        The windows, and what ``upcycle.json`` says about those that the model wrote.

    Raises:
        UsageError: nearly all of it is repetition.
        CheckpointError: the model's logits are not finite.
        EnvironmentFault: the model does not fit in memory.
    """
    written = write_windows(wanted, model, kept, progress)
    found = repetition(written)
    try:
        judge(found, progress)
    except Exception:
        kept.unlink(missing_ok=True)  # there is nothing to continue, and another command can use the folder
        raise
    about = wanted.about | {"repetitive_windows": found.collapsed, "distinct_runs": round(found.distinct, 4)}
    return evenly_mixed([written] if read is None else [written, read]), about


def evenly_mixed(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all ``pieces``, each spread evenly over the whole, so that every batch has some of each."""
    places = torch.cat([(torch.arange(len(piece)) + 0.5) / len(piece) for piece in pieces])
    return torch.cat(list(pieces))[places.argsort(stable=True)]


def write_windows(wanted: OwnText, model: Path, kept: Path, progress: Progress) -> torch.Tensor:
    """Return what the model writes, ids ``[N, W]``, as far as ``kept`` does not hold it already.

    The draws of a window depend on the seed and on the window's number alone, so that a run that continues writes the same.

    Raises:
        CheckpointError: the model's logits are not finite.
        EnvironmentFault: the model does not fit in memory.
    """
    done = _read(wanted, kept)
    at_once = rows_at_once(wanted.window)
    steps = wanted.window * -(-wanted.windows // at_once)
    with progress.phase("writing calibration text", steps):
        progress.advance(wanted.window * -(-len(done) // at_once))
        if len(done) == wanted.windows:
            return done
        loaded = load_model(model)
        for first in range(len(done), wanted.windows, at_once):
            rows = min(at_once, wanted.windows - first)
            done = torch.cat([done, _batch(wanted, loaded, range(first, first + rows), progress)])
            _keep(done, kept)
    return done


@torch.no_grad()
def _batch(wanted: OwnText, model: Any, numbers: range, progress: Progress) -> torch.Tensor:
    """Write the windows of these ``numbers`` side by side, ids ``[B, W]``.

    What the model writes after the end of a text stays in the window, as the next text does in windows of files.
    """
    draws = torch.stack([draws_of(wanted.seed, number, wanted.window) for number in numbers])
    beginnings = torch.tensor(sorted(set(range(wanted.vocabulary)) - set(wanted.special)))
    ids = torch.empty(draws.shape, dtype=torch.long)
    ids[:, 0] = beginnings[(draws[:, 0] * len(beginnings)).long()]
    cache: Any = None
    progress.advance()
    for place in range(1, wanted.window):
        # The cache that the model makes itself suits every architecture: windows, convolutions, linear attention.
        output = model(ids[:, place - 1 : place], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1, : wanted.vocabulary].double() / wanted.temperature
        ids[:, place] = _chosen(logits, draws[:, place])
        progress.advance()
    return ids


def draws_of(seed: int, number: int, count: int) -> torch.Tensor:
    """Return ``count`` random numbers from 0 to 1, fp64 ``[count]``, that belong to one window."""
    rng = torch.Generator().manual_seed(((seed << 24) + number) % (1 << 63))
    return torch.rand(count, dtype=torch.float64, generator=rng)


def _chosen(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return the token ``[B]`` at which each row's cumulated probabilities pass its draw ``[B]``; logits are fp64 ``[B, V]``."""
    sums = logits.softmax(-1).cumsum(-1)
    if not sums[:, -1].isfinite().all():
        raise CheckpointError(
            "the model writes no text: its logits are not finite",
            hint="the checkpoint is damaged or its training diverged; download it again or use an earlier one",
        )
    places = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)
    return places.clamp_(max=sums.shape[1] - 1)[:, 0]


def _read(wanted: OwnText, kept: Path) -> torch.Tensor:
    """Return the windows ``[n, W]`` that an earlier run kept; none where the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    nothing = torch.empty(0, wanted.window, dtype=torch.long)
    if not kept.exists():
        return nothing
    try:
        found = load_file(kept).get(_TENSOR)
    except (OSError, SafetensorError):
        return nothing
    if found is None or found.dtype != torch.long or found.dim() != 2 or found.shape[1] != wanted.window:
        return nothing
    whole = len(found) == wanted.windows or len(found) % rows_at_once(wanted.window) == 0
    return found if whole and len(found) <= wanted.windows else nothing


def _keep(windows: torch.Tensor, kept: Path) -> None:
    from safetensors.torch import save_file

    write_whole(kept, lambda partial: save_file({_TENSOR: windows}, partial))
