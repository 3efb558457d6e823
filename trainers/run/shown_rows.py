"""The first rows of a run as they are trained on, for a look before it begins. L positions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from upcycle.architectures.clean_settings import CONFIG, clean_file
from upcycle.architectures.stock import build_config
from upcycle.files.locate import locate
from upcycle.trainers.checkpoints.prepare_model import predicts_masked, tokenizer_of
from upcycle.trainers.data.batches import open_stream
from upcycle.trainers.data.data_check import check_data
from upcycle.trainers.data.packed_attention import check_fits
from upcycle.trainers.pictures.pictures import pictures_of
from upcycle.trainers.recipe.training_recipe import TrainRecipe
from upcycle.trainers.run.stage import check_objective


@dataclass(frozen=True)
class ShownPart:
    """Consecutive tokens as text, and whether they are learned or only read."""

    text: str
    learned: bool


@dataclass(frozen=True)
class ShownRow:
    """A row: its domain, its numbers of tokens, of those that are learned, and of padding, and its documents in parts."""

    domain: str
    tokens: int
    learned: int
    padding: int
    documents: list[list[ShownPart]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def shown_rows(recipe: TrainRecipe, count: int, say: Callable[[str], None]) -> list[ShownRow]:
    """The first ``count`` rows of a run's first stage. Its data and length are checked as the run checks them; no weights are read.

    Of a masked language model, the tokens that it predicts are learned, and shown as they are in the text; of preferences, both
    answers are.

    Args:
        recipe: the run's.
        count: how many rows.
        say: called with what the check says.

    Raises:
        UpcycleError: the data cannot be trained on, rows are longer than the model's context, or it has no tokenizer.
    """
    origin = locate(recipe.model).path
    tokenizer, masks = tokenizer_of(origin), predicts_masked(origin)
    check_fits(build_config(clean_file(origin / CONFIG), str(origin)), tokenizer, recipe.length)
    check_objective(recipe, recipe.stages[0], masks)
    data, key = recipe.data_of(recipe.stages[0]), recipe.data_key(recipe.stages[0])
    pictures = pictures_of(origin)
    check_data(data, tokenizer, recipe.length, say, masks=masks, pictures=pictures, key=key)
    stream = open_stream(
        data,
        tokenizer,
        length=recipe.length,
        micro_batch=count,
        rank=0,
        world_size=1,
        seed=recipe.seed,
        masks=masks,
        pictures=pictures,
    )
    batch = stream.next_batch()
    learned = batch.mask if batch.compared is None else batch.mask | batch.compared
    rows = zip(batch.domains, batch.ids, learned, batch.positions, batch.real, strict=True)
    found = [_row(tokenizer, *row) for row in rows]
    return [_shorter(row, pictures.token) for row in found] if pictures and batch.pictures else found


def _shorter(row: ShownRow, token: str) -> ShownRow:
    """The same row with the tokens of an image counted, and not repeated."""
    many = re.compile(f"(?:{re.escape(token)}){{2,}}")

    def counted(part: ShownPart) -> ShownPart:
        text = many.sub(lambda found: f"{token} (x {len(found[0]) // len(token)})", part.text)
        return replace(part, text=text)

    return replace(row, documents=[list(map(counted, document)) for document in row.documents])


def _row(
    tokenizer: Any, domain: str, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, real: torch.Tensor
) -> ShownRow:
    tokens = int(real.sum())
    begins = [*torch.nonzero((positions == 0) & real).flatten().tolist(), tokens]
    documents = [_document(tokenizer, ids[start:end], mask[start:end]) for start, end in pairwise(begins)]
    return ShownRow(domain, tokens, int(mask.sum()), len(ids) - tokens, documents)


def _document(tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[ShownPart]:
    changes = (torch.nonzero(mask[1:] != mask[:-1]).flatten() + 1).tolist()
    return [
        ShownPart(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False), bool(mask[start]))
        for start, end in pairwise([0, *changes, len(ids)])
    ]
