"""Masks tokens of rows for masked language models (BERT, arXiv 1810.04805). B rows of L positions.

What is masked in a row depends on the seed and on the row's number in the global order alone: not on how rows are divided among
ranks and passes, nor on whether the run was stopped and continued. A row that is read again in another epoch has another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from upcycle.errors import UsageError
from upcycle.text.windows import Frame, frame_of
from upcycle.trainers.data.keyed_random import random_words, uniform
from upcycle.trainers.recipe.data_recipe import MaskingRecipe


class Masker:
    """Chooses tokens to predict, and what stands in their place.

    Args:
        recipe: how many, and what of.
        tokenizer: the model's; its special tokens are neither chosen nor put in a place.
        seed: the run's.

    Attributes:
        frame: the special tokens around every document.

    Raises:
        UsageError: the tokenizer has no mask token.
    """

    def __init__(self, recipe: MaskingRecipe, tokenizer: Any, seed: int) -> None:
        if tokenizer.mask_token_id is None:
            raise UsageError(
                "the tokenizer has no mask token, which stands for the tokens to predict",
                hint="use the tokenizer that the masked language model came with",
            )
        self.frame: Frame = frame_of(tokenizer)
        self._recipe, self._seed = recipe, seed
        self._mask = int(tokenizer.mask_token_id)
        special = set(tokenizer.all_special_ids)
        self._special = torch.tensor(sorted(special))
        self._others = np.array([i for i in range(len(tokenizer)) if i not in special], np.int64)

    def __call__(
        self, ids: torch.Tensor, real: torch.Tensor, rows: Sequence[object]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a model reads, int64 ``[B, L]``, and which tokens it is to predict, bool ``[B, L]``.

        Args:
            ids: of plain rows, int64 ``[B, L]``.
            real: which tokens are no padding, bool ``[B, L]``.
            rows: for each, what its choice depends on beside the seed.
        """
        count = ids.shape[1]
        may = real & ~torch.isin(ids, self._special)
        may[:, 0] = False  # losses are those of positions 1 and on
        chosen, given = torch.zeros_like(may), ids.clone()
        for place, row in enumerate(rows):
            key = ("masked tokens", self._seed, row)
            order = uniform(count, *key, "order")
            free = np.flatnonzero(may[place].numpy())
            picked = free[np.argsort(order[free], kind="stable")][: max(1, round(self._recipe.fraction * len(free)))]
            chosen[place, picked] = True
            kind = uniform(count, *key, "kind")[picked]
            others = self._others[random_words(count, *key, "other")[picked] % np.uint64(len(self._others))]
            masked = picked[kind < self._recipe.masked]
            given[place, masked] = self._mask
            drawn = (kind >= self._recipe.masked) & (kind < self._recipe.masked + self._recipe.random)
            given[place, picked[drawn]] = torch.from_numpy(others[drawn])
        return given, chosen
