"""Which tokens of a row are masked: by seed and row alone, as many as asked for, and none that is special."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import sums, write_chats
from encoder_cases import SPECIAL, character_tokenizer
from training_runs import write_text

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.trainers.data.batches import open_stream, open_validation
from upcycle.trainers.data.data_check import check_data
from upcycle.trainers.data.masking import Masker
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.recipe.data_recipe import DataRecipe, MaskingRecipe

LENGTH, MASK = 64, SPECIAL.index("[MASK]")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    (tmp_path / "model").mkdir()
    character_tokenizer(tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


def data(folder: Path, **masking: float) -> DataRecipe:
    content: dict[str, Any] = {"domains": {"cats": write_text(folder / "text.jsonl")}, "shuffle": "4KB"}
    content |= {"cache": str(folder / "cache"), "validation": {"fraction": 0.1, "tokens": 256, "batch": 2}}
    return DataRecipe.model_validate({**content, **({"masking": masking} if masking else {})})


def batches(recipe: DataRecipe, tokenizer: Any, micro: int = 4, world: int = 1, seed: int = 3) -> list[PackedBatch]:
    """Twenty-four rows, in the global order."""
    streams = [
        open_stream(
            recipe, tokenizer, length=LENGTH, micro_batch=micro, rank=rank, world_size=world, seed=seed, masks=True
        )
        for rank in range(world)
    ]
    return [stream.next_batch() for _ in range(24 // (micro * world)) for stream in streams]


def together(found: list[PackedBatch], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in found])


def test_rows_are_masked_alike_however_they_are_divided(tmp_path: Path, tokenizer: Any) -> None:
    recipe = data(tmp_path)
    plain = batches(recipe, tokenizer)
    for micro, world in ((1, 1), (2, 2), (1, 4)):
        other = batches(recipe, tokenizer, micro, world)
        for name in ("ids", "given", "mask", "unpadded"):
            assert torch.equal(together(plain, name), together(other, name)), (name, micro, world)
    assert not torch.equal(together(plain, "mask"), together(batches(recipe, tokenizer, seed=4), "mask"))
    again = open_stream(recipe, tokenizer, length=LENGTH, micro_batch=4, rank=0, world_size=1, seed=3, masks=True)
    again.next_batch()
    state = again.state()
    later = open_stream(recipe, tokenizer, length=LENGTH, micro_batch=4, rank=0, world_size=1, seed=3, masks=True)
    later.restore(state)
    assert torch.equal(later.next_batch().given, plain[1].given)
    changed = open_stream(
        data(tmp_path, fraction=0.3), tokenizer, length=LENGTH, micro_batch=4, rank=0, world_size=1, seed=3, masks=True
    )
    with pytest.raises(UsageError, match="masking was"):
        changed.restore(state)


def test_as_many_are_masked_as_asked_for_and_documents_have_their_frame(tmp_path: Path, tokenizer: Any) -> None:
    found = batches(data(tmp_path, fraction=0.25, masked=0.5, random=0.3), tokenizer)
    ids, given, mask, text = (together(found, name) for name in ("ids", "given", "mask", "unpadded"))
    special = ids < len(SPECIAL)
    assert not (mask & special).any()
    assert not mask[:, 0].any()
    assert torch.equal(given[~mask], ids[~mask])
    assert torch.equal(text, together(found, "real"))
    starts = together(found, "positions") == 0
    assert (ids[starts & text] == 0).any()  # documents begin with [CLS], unless a row begins within one ...
    assert (ids[text & ~starts] != 0).all()
    assert ((ids == 1) & text).any()  # ... and end with [SEP]
    free = (text & ~special)[:, 1:].sum(1)
    assert torch.equal(mask.sum(1), (0.25 * free).round().long().clamp(min=1))
    kinds = Counter(
        "mask" if new == MASK else "stays" if new == old else "other"
        for new, old in zip(given[mask].tolist(), ids[mask].tolist(), strict=True)
    )
    total = sum(kinds.values())
    for kind, share in (("mask", 0.5), ("other", 0.3), ("stays", 0.2)):
        # Five standard deviations of a count of independent choices; a random token can be the one that was there.
        assert abs(kinds[kind] / total - share) <= 5 * (share * (1 - share) / total) ** 0.5 + 0.3 / 60, kinds
    assert (given[mask & (given != MASK)] >= len(SPECIAL)).all()


def test_validation_is_masked_in_the_same_way_for_every_run(tmp_path: Path, tokenizer: Any) -> None:
    recipe = data(tmp_path)
    first, second = (open_validation(recipe, tokenizer, length=LENGTH, masks=True)["cats"] for _ in range(2))
    assert all(
        torch.equal(a.given, b.given) and torch.equal(a.mask, b.mask) for a, b in zip(first, second, strict=True)
    )
    masks = together(first, "mask")
    assert len({tuple(row) for row in masks.tolist()}) == len(masks)


def test_what_is_wrong_is_said(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"masked 0\.8 and random 0\.3 are more than all"):
        MaskingRecipe(masked=0.8, random=0.3)
    tokenizer.mask_token = None
    with pytest.raises(UsageError, match="has no mask token"):
        Masker(MaskingRecipe(), tokenizer, 0)


def test_the_check_reads_text_as_a_masked_language_model_does(tmp_path: Path, tokenizer: Any) -> None:
    """Such tokenizers have no end-of-text token, and no chat template."""
    recipe = data(tmp_path)
    domain = recipe.domains[0].model_copy(update={"too_long": "drop"})
    recipe = recipe.model_copy(update={"domains": [domain]})
    check_data(recipe, tokenizer, LENGTH, lambda _: None, masks=True)
    tokenised = set((tmp_path / "cache").rglob("*.tokens"))
    assert tokenised
    batches(recipe, tokenizer)
    assert set((tmp_path / "cache").rglob("*.tokens")) == tokenised, "the run takes what the check tokenised"
    chats = recipe.model_copy(
        update={"domains": [domain.model_copy(update={"text": [write_chats(tmp_path / "c.jsonl", sums(3))]})]}
    )
    with pytest.raises(UsageError, match="conversations or pairs, and a masked language model learns text"):
        check_data(chats, tokenizer, LENGTH, lambda _: None, masks=True)
