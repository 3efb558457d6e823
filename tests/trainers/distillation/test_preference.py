"""Preference distillation against its formula in fp64, however a batch is divided, and in a run from the dense parent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import messages, sums
from divided_steps import divided_step, far
from training_runs import recipe_for, run, steps

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.trainers.data.batches import open_stream, open_validation
from upcycle.trainers.data.data_check import check_data
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation.preference import pairs_in, preference_losses
from upcycle.trainers.recipe.data_recipe import DataRecipe

BETA = 0.3


def write_preferences(path: Path, count: int = 40) -> str:
    rows = []
    for number, chat in enumerate(sums(count)):
        wrong = [*chat[:-1], {"role": "assistant", "content": f"I do not know {number}."}]
        rows.append(json.dumps({"chosen": chat, "rejected": wrong}) + "\n")
    path.write_text("".join(rows))
    return str(path)


def data_of(folder: Path, **keys: Any) -> dict[str, Any]:
    domain = {"text": write_preferences(folder / "prefer.jsonl"), "chosen": "chosen", "rejected": "rejected"}
    return {"domains": {"prefer": domain}, "chat_template": "turns", "cache": str(folder / "cache"), **keys}


@pytest.fixture(scope="module")
def models(stock: Any) -> tuple[Any, Any]:
    student, parent = stock("qwen3_moe", experts=6, top_k=2).double(), stock("qwen3_moe", experts=4, top_k=2).double()
    return student, parent


def test_the_loss_is_the_papers_however_the_batch_is_divided(models: tuple[Any, Any], tmp_path: Path) -> None:
    student, parent = models
    tokenizer = load_tokenizer(DEMO_FOLDER / "model")
    data = DataRecipe.model_validate(data_of(tmp_path))
    stream = open_stream(data, tokenizer, length=160, micro_batch=4, rank=0, world_size=1, seed=0)
    batch = stream.next_batch()
    assert not batch.mask.any()
    assert batch.compared is not None
    by_hand = []
    for row in range(4):
        starts = [*torch.nonzero((batch.positions[row] == 0) & batch.real[row]).flatten().tolist()]
        starts.append(int(batch.real[row].sum()))
        assert len(starts) % 2 == 1
        said = []
        for first, end in pairwise(starts):
            ids, answer = batch.ids[row, first:end], batch.compared[row, first:end]
            scores = [model(ids[None]).logits[0].log_softmax(-1) for model in (student, parent)]
            places = torch.nonzero(answer).flatten()
            said.append([sum(score[p - 1, ids[p]].item() for p in places) for score in scores])
        for (s_w, t_w), (s_l, t_l) in zip(said[::2], said[1::2], strict=True):
            by_hand.append(-math.log(1 / (1 + math.exp(-BETA * ((s_w - t_w) - (s_l - t_l))))))
    assert len(by_hand) > 4
    stage = {"losses": {}, "distillation": {"logits": 0, "next_token": 0, "preference": 0.7, "beta": BETA}}
    whole, wanted, _ = divided_step(student, parent, stage, 1, 1, batch)
    assert whole.parts["preference"] == pytest.approx(0.7 * sum(by_hand) / len(by_hand), rel=1e-6)
    for world, passes in ((1, 4), (2, 2)):
        found, gradient, _ = divided_step(student, parent, stage, world, passes, batch)
        assert found.parts["preference"] == pytest.approx(whole.parts["preference"], rel=1e-6)
        assert far(gradient, wanted) < 1e-6


def test_rows_of_text_beside_preferences_are_no_pairs() -> None:
    """Three documents of text come first, so that pairs cannot be told by the places of documents alone."""
    positions = torch.tensor([[0, 1, 0, 1, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0, 1, 0]])
    compared = torch.tensor([[False] * 8, [False, True, False, True, True, False, False, False]])
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8], [5, 6, 5, 7, 8, 5, 6, 5]])
    mask = (positions > 0) & ~compared
    batch = PackedBatch(ids, mask, positions, ("text", "prefer"), torch.ones_like(mask), compared)
    assert pairs_in(batch) == 1
    student, parent = (torch.randn(2, 8, 9, generator=torch.Generator().manual_seed(seed)).double() for seed in (1, 2))
    s, t = student[1].log_softmax(-1), parent[1].log_softmax(-1)
    of_student, of_parent = (float(m[0, 6] - m[2, 7] - m[3, 8]) for m in (s, t))
    margin = of_student - of_parent
    (found,) = preference_losses(student, parent, batch, 0.4).tolist()
    assert found == pytest.approx(math.log(1 + math.exp(-0.4 * margin)), rel=1e-9)


def test_a_pair_stays_in_one_row_or_is_left_out_and_the_better_answer_is_validated(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(DEMO_FOLDER / "model")
    data = DataRecipe.model_validate(data_of(tmp_path, validation={"fraction": 0.3}))
    said: list[str] = []
    check_data(data, tokenizer, 100, said.append)
    assert said[0] == "domain prefer: 40 preferences of 'chosen' over 'rejected'"
    assert "documents longer than 100 tokens are left out (too_long: drop)" in said[1]
    for batch in open_validation(data, tokenizer, length=160)["prefer"]:
        for row in range(len(batch.ids)):
            learned = tokenizer.decode(batch.ids[row][batch.mask[row]])
            assert " plus " in learned or "Yes." in learned
            assert "do not know" not in learned


@pytest.mark.long
def test_a_run_begins_at_the_parent_and_moves_away_from_it(converted: Callable[..., Path], tmp_path: Path) -> None:
    stage = {"losses": {}, "distillation": {"logits": 0, "next_token": 0, "preference": 1.0, "beta": 1.0}}
    recipe = recipe_for(converted("moe", experts=2), tmp_path, data=data_of(tmp_path), length=160, stage=stage)
    run(recipe)
    found = [line["loss/preference"] for line in steps(recipe)]
    assert found[0] == pytest.approx(math.log(2), abs=1e-4), "an exact copy prefers as its parent does"
    assert found[-1] < found[0] - 0.05


@pytest.mark.long
@pytest.mark.parametrize(
    ("chats", "stage", "message"),
    [
        (False, {}, "domain 'prefer' holds preferences, and no loss compares their answers"),
        (True, {"distillation": {"preference": 1.0}}, "distillation.preference is 1, and no domain holds preferences"),
    ],
)
def test_preferences_and_their_loss_need_each_other(
    converted: Callable[..., Path], tmp_path: Path, chats: bool, stage: Any, message: str
) -> None:
    data = data_of(tmp_path, validation={"fraction": 0.1})
    if chats:
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages("Hi", "Hello")}) + "\n")
        data |= {"domains": {"chat": str(tmp_path / "chat.jsonl")}, "validation": {"fraction": 0}}
    recipe = recipe_for(converted("moe", experts=2), tmp_path, data=data, length=160, stage={"losses": {}, **stage})
    with pytest.raises(UsageError, match=message):
        run(recipe)
