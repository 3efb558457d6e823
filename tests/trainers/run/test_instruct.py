"""Runs on conversations: the loss is that of the answers, and a user's file trains, exports and answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import sums, write_chats
from click.testing import CliRunner
from training_runs import losses, recipe_for, run, steps

from upcycle.architectures.stock import load_stock_model, load_tokenizer
from upcycle.cli.main import cli
from upcycle.errors import UsageError
from upcycle.models.experts import use_eager_experts
from upcycle.trainers.data.batches import open_stream
from upcycle.trainers.data.chat_templates import BUILT_IN
from upcycle.trainers.recipe.training_recipe import TrainRecipe

Model = Callable[[str], Path]


def chat_recipe(model: Path, folder: Path, **changes: Any) -> TrainRecipe:
    folder.mkdir(exist_ok=True)
    data = {
        "domains": {"sums": write_chats(folder / "sums.jsonl", sums())},
        "chat_template": "turns",
        "cache": str(folder / "cache"),
        "validation": {"fraction": 0.1, "tokens": 128, "batch": 2},
        **changes.pop("data", {}),
    }
    return recipe_for(model, folder, data=data, **{"length": 64, **changes})


def test_the_loss_is_that_of_the_answers_alone(pico_moe: Model, tmp_path: Path) -> None:
    """The formula in fp64: every conversation alone, with the mask that transformers makes of its marks."""
    recipe = chat_recipe(pico_moe("mixtral"), tmp_path, stage={"steps": 1})
    run(recipe)
    model, tokenizer = (
        use_eager_experts(load_stock_model(pico_moe("mixtral"))).double(),
        load_tokenizer(pico_moe("mixtral")),
    )
    masks = {}
    for chat in sums():
        made = tokenizer.apply_chat_template(
            chat, chat_template=BUILT_IN["turns"], return_assistant_tokens_mask=True, return_dict=True
        )
        masks[tuple(made["input_ids"])] = made["assistant_masks"]
    stream = open_stream(recipe.data, tokenizer, length=64, micro_batch=4, rank=0, world_size=1, seed=0)
    batch = stream.next_batch()
    total, count, documents = 0.0, 0, 0
    with torch.no_grad():
        for row in range(4):
            starts = [*torch.nonzero(batch.positions[row] == 0).flatten().tolist(), int(batch.real[row].sum())]
            for first, end in pairwise(starts):
                ids = batch.ids[row, first:end]
                mask = masks[tuple(ids.tolist())]  # no example is cut, and none leaks into another
                logits = model(ids[None]).logits[0].log_softmax(-1)
                for place in range(1, len(ids)):
                    total -= float(logits[place - 1, ids[place]]) * mask[place]
                    count += mask[place]
                documents += 1
    assert documents > 4
    assert losses(recipe)[0] == pytest.approx(total / count, rel=1e-5)
    assert count < int(batch.real.sum()) / 2


def test_a_template_that_a_stages_own_data_lack_is_named_by_their_key(pico_moe: Model, tmp_path: Path) -> None:
    own: dict[str, Any] = {"domains": {"sums": write_chats(tmp_path / "sums.jsonl", sums())}}
    stage = {"name": "align", "data": own}
    with pytest.raises(UsageError, match=r"stages.align.data: there are conversations") as refused:
        run(chat_recipe(pico_moe("mixtral"), tmp_path, stage=stage))
    assert "--set stages.align.data.chat_template=turns" in str(refused.value.hint)
    stage["data"] = own | {"chat_template": "away.jinja"}
    with pytest.raises(UsageError, match=r"stages.align.data.chat_template: away.jinja cannot be read"):
        run(chat_recipe(pico_moe("mixtral"), tmp_path, stage=stage))


@pytest.mark.long
def test_a_stopped_run_on_conversations_continues_bit_for_bit(pico_moe: Model, tmp_path: Path) -> None:
    whole = chat_recipe(
        pico_moe("mixtral"), tmp_path / "whole", stage={"steps": 4, "schedule": {"kind": "constant"}}, length=32
    )
    run(whole)
    parts = whole.model_copy(update={"output": str(tmp_path / "parts")})
    run(parts.model_copy(update={"stages": [parts.stages[0].model_copy(update={"steps": 2})]}))
    shutil.rmtree(tmp_path / "whole" / "cache")  # it is tokenised again
    run(parts)
    assert steps(parts) == steps(whole)


@pytest.mark.long
def test_a_users_chat_file_trains_exports_and_answers(pico_moe: Model, tmp_path: Path) -> None:
    """The commands of docs/guides/training_data.md, on a file of 200 conversations."""
    data = write_chats(tmp_path / "chat.jsonl", sums(200))
    out = tmp_path / "tuned"
    words = ["train", "instruct", "--model", str(pico_moe("mixtral")), "--output", str(out), "--set", f"data={data}"]
    words += ["--set", "data.chat_template=turns", "--set", f"data.cache={tmp_path / 'cache'}"]
    small = {"length": 64, "global_batch": 16, "micro_batch": 8, "stages.instruct.learning_rate": 0.02}
    small |= {"stages.instruct.steps": 30, "stages.instruct.tokens": "null", "stages.instruct.schedule.warmup": 0}
    for key, value in {**small, "log.peak_tflops": 0.05, "log.validation": 0, "seed": 1}.items():
        words += ["--set", f"{key}={value}"]
    trained = CliRunner().invoke(cli, words)
    assert trained.exit_code == 0, trained.output
    assert "200 rows, whose conversation is in column 'messages'" in trained.stderr
    model, tokenizer = load_stock_model(out / "model", "float32"), load_tokenizer(out / "model")
    assert tokenizer.chat_template == BUILT_IN["turns"]
    asked = [{"role": "user", "content": "What is 2 plus 3?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert written[-1] == tokenizer.eos_token_id, "it has learned where an answer ends"
    assert " plus " in tokenizer.decode(written)
