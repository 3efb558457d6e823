"""What routers follow, by OpenMoE's three questions: token ids, places in a sequence, and what was learned early.

N windows of L tokens each, E experts, K top-k.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.evaluation.window_losses import context_of
from upcycle.files.locate import locate
from upcycle.files.output.ownership import CHECKPOINTS
from upcycle.files.user_paths import user_path
from upcycle.models.load import load_model
from upcycle.progress import SILENT, Progress
from upcycle.text.reading.plain_text import read_text
from upcycle.text.windows import encode
from upcycle.trainers.routing.capacity import within_capacity
from upcycle.trainers.routing.router_records import capture

CAPACITY = 1.25  # OpenMoE's factor in training
WINDOW_PARTS = 5  # of a window, from its beginning to its end
_LEAST = 4  # choices that an expert takes at least, as there
_BATCH = 8


@dataclass(frozen=True)
class LayerHabits:
    """What one layer's first choices follow.

    Attributes:
        layer: its index.
        by_token: of tokens of the second half of the windows whose id was in the first half: the share whose first expert is the one
            that the id had most often there.
        by_majority: the share of the same tokens whose first expert is the one that was most frequent of all in the first half; a
            router that does not look at tokens reaches no more.
        information: I(token id; first expert) / H(first expert), from 0 (independent) to 1 (decided by the id), each entropy by Miller
            and Madow's estimate; None where one expert is the first of all tokens.
        dropped: the share of choices that find no room, with a capacity.
        dropped_by_part: the same for each fifth of the windows, from first to last.
    """

    layer: int
    by_token: float | None
    by_majority: float | None
    information: float | None
    dropped: float
    dropped_by_part: list[float]


@dataclass(frozen=True)
class EarlierChoices:
    """How many first choices an earlier model shares with this one, by layer and in the mean; ``step`` of a run's checkpoint."""

    model: str
    step: int | None
    same: float
    layers: list[float]


@dataclass(frozen=True)
class RoutingHabits:
    """The habits of all layers on some windows of text, and what earlier models chose there."""

    tokens: int
    window: int
    capacity_factor: float
    seen_tokens: int
    layers: list[LayerHabits]
    earlier: list[EarlierChoices]


@dataclass(frozen=True)
class _Chosen:
    """Experts and their weights of all tokens ``[N L, K]``, and the number of experts."""

    experts: torch.Tensor
    weights: torch.Tensor
    count: int

    @property
    def first(self) -> torch.Tensor:
        """The expert of largest weight, ``[N L]``."""
        return self.experts.gather(1, self.weights.argmax(1, keepdim=True)).flatten()


def routing_habits(
    model: str,
    names: Sequence[str],
    tokens: int | None,
    window: int = 512,
    earlier: Sequence[str] = (),
    capacity_factor: float = CAPACITY,
    progress: Progress = SILENT,
) -> RoutingHabits:
    """Ask what the routers of a MoE follow (OpenMoE, Xue et al., arXiv 2402.01739, section 4).

    Whole windows of every text are read, one text behind the other; halves are of the windows of each text.

    Args:
        model: folder, hub id, or demo.
        names: UTF-8 files, or prose or code.
        tokens: most tokens of each text; None: all.
        window: tokens of a window, at most the model's context; a capacity is of a window.
        earlier: folders of models of the same shape, or of training runs, all of whose checkpoints are compared.
        capacity_factor: of the simulated capacity; the model itself drops nothing.
        progress: receives the progress.

    Raises:
        UsageError: it is no MoE whose routers can be read, a text is shorter than two windows, or an earlier model has other layers.
    """
    contents = {name: read_text(name) for name in names}
    before = _earlier(earlier)
    window = min(window, context_of(model))
    tokenizer = load_tokenizer(locate(model).path)
    first, second = [], []
    for name, content in contents.items():
        ids = encode(tokenizer, content)[:tokens]
        rows = ids[: len(ids) // window * window].view(-1, window)
        if len(rows) < 2:
            raise UsageError(
                f"{name} has {len(ids):,} tokens, and two windows of {window} are needed",
                hint="a longer --text, a smaller --window, or more --tokens",
            )
        first.append(rows[: len(rows) // 2])
        second.append(rows[len(rows) // 2 :])
    windows, halves = torch.cat([*first, *second]), sum(map(len, first))
    chosen = _choices(model, windows, progress, "reading what routers choose")
    split = halves * window
    ids = windows.flatten()
    known = torch.isin(ids[split:], ids[:split])
    layers = [_layer(layer, ids, found, split, window, capacity_factor) for layer, found in chosen.items()]
    compared = [_compared(folder, step, windows, chosen, progress) for folder, step in before]
    return RoutingHabits(len(ids), window, capacity_factor, int(known.sum()), layers, compared)


def _choices(source: str | Path, windows: torch.Tensor, progress: Progress, title: str) -> dict[int, _Chosen]:
    model = load_model(source)
    parts: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    counts: dict[int, int] = {}
    with progress.phase(title, len(windows)), torch.no_grad(), capture(model) as recorder:
        for batch in windows.split(_BATCH):
            model(batch, use_cache=False)
            for record in recorder.take():
                parts.setdefault(record.layer, []).append((record.experts.cpu(), record.weights.float().cpu()))
                counts[record.layer] = record.rule.experts
            progress.advance(len(batch))
    del model, recorder
    gc.collect()  # modules refer to each other, and an earlier model is loaded next
    return {
        layer: _Chosen(torch.cat([one for one, _ in found]), torch.cat([one for _, one in found]), counts[layer])
        for layer, found in sorted(parts.items())
    }


def _layer(
    layer: int, ids: torch.Tensor, chosen: _Chosen, split: int, window: int, capacity_factor: float
) -> LayerHabits:
    by_token, by_majority = predictable(ids[:split], chosen.first[:split], ids[split:], chosen.first[split:])
    groups = torch.ones(len(ids) // window, window, dtype=torch.bool)
    real = chosen.experts < chosen.count  # under some rules, not all K are experts
    kept = within_capacity(
        chosen.weights, chosen.experts, chosen.count, capacity_factor, _LEAST, "position", groups, real
    )
    lost = (~kept & real).view(len(groups), window, -1).sum((0, 2)).double()
    asked = real.view(len(groups), window, -1).sum((0, 2)).double()
    part = torch.arange(window) * WINDOW_PARTS // window
    shares = torch.zeros(WINDOW_PARTS, dtype=torch.float64).index_add_(0, part, lost) / torch.zeros(
        WINDOW_PARTS, dtype=torch.float64
    ).index_add_(0, part, asked).clamp(min=1)
    return LayerHabits(
        layer=layer,
        by_token=by_token,
        by_majority=by_majority,
        information=shared_information(ids, chosen.first),
        dropped=float(lost.sum() / asked.sum().clamp(min=1)),
        dropped_by_part=[round(float(share), 6) for share in shares],
    )


def predictable(
    ids: torch.Tensor, firsts: torch.Tensor, later_ids: torch.Tensor, later_firsts: torch.Tensor
) -> tuple[float | None, float | None]:
    """How many of some tokens' experts are those that their ids had most often before, and that all ids had.

    Args:
        ids: token ids ``[n]``.
        firsts: their experts ``[n]``.
        later_ids: those that are predicted, ``[m]``; ids that are not among ``ids`` do not count.
        later_firsts: their experts ``[m]``.

    Returns:
        Both shares; ``None`` where no id was seen before.
    """
    known, place = ids.unique(return_inverse=True)
    table = torch.zeros(len(known), int(max(firsts.max(), later_firsts.max())) + 1, dtype=torch.long)
    table.index_put_((place, firsts), torch.ones_like(firsts), accumulate=True)
    seen = torch.isin(later_ids, known)
    if not bool(seen.any()):
        return None, None
    usual = table.argmax(1)[torch.searchsorted(known, later_ids[seen])]
    actual = later_firsts[seen]
    return float((usual == actual).double().mean()), float((table.sum(0).argmax() == actual).double().mean())


def shared_information(ids: torch.Tensor, firsts: torch.Tensor) -> float | None:
    """I(id; expert) / H(expert) of pairs ``[n]``, each entropy plus (m - 1) / 2n for its m values that occur; from 0 to 1."""
    both = firsts.long() * (int(ids.max()) + 1) + ids
    of_expert = _entropy(firsts)
    if of_expert <= 0:
        return None
    return min(1.0, max(0.0, (of_expert + _entropy(ids) - _entropy(both)) / of_expert))


def _entropy(values: torch.Tensor) -> float:
    counts = values.unique(return_counts=True)[1].double()
    if len(counts) == 1:
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum()) + (len(counts) - 1) / (2 * len(values))


def _earlier(names: Sequence[str]) -> list[tuple[Path, int | None]]:
    """Folders of models, and the steps of those that are checkpoints, by rising steps."""
    found: list[tuple[Path, int | None]] = []
    for name in names:
        folder = user_path(name)
        steps = sorted((folder / CHECKPOINTS).glob("step-*/config.json"))
        if steps:
            found += [(path.parent, int(path.parent.name.rpartition("-")[2])) for path in steps]
        else:
            found.append((locate(name).path, None))
    return found


def _compared(
    folder: Path, step: int | None, windows: torch.Tensor, chosen: Mapping[int, _Chosen], progress: Progress
) -> EarlierChoices:
    before = _choices(folder, windows, progress, f"reading {folder.name}")
    if {layer: found.count for layer, found in before.items()} != {
        layer: found.count for layer, found in chosen.items()
    }:
        raise UsageError(
            f"{folder} has other MoE layers, or other numbers of experts, than the model", hint="an earlier state of it"
        )
    layers = [float((before[layer].first == found.first).double().mean()) for layer, found in chosen.items()]
    return EarlierChoices(str(folder), step, math.fsum(layers) / len(layers), layers)
