"""Training masked language models: the stock loss, on whatever ranks and passes, and what comes out is used as a conversion is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import text_encoder
from training_runs import losses, on_ranks, recipe_for, run, steps, two_ranks
from wrapped_models import auto_class

import upcycle
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.load import load_model
from upcycle.trainers.checkpoints.prepare_model import tokenizer_of
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.data.batches import open_stream
from upcycle.trainers.data.packed_attention import packed_forward
from upcycle.trainers.losses.next_token import token_losses

pytestmark = pytest.mark.one_in(8)  # the other cases are long

NAMES = ["bert", "roberta", "electra", "mpnet", "distilbert", "modernbert", "deberta", "albert"]
_DROPOUT = {"distilbert": ("dropout", "attention_dropout"), "modernbert": ()}
_USUAL = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
SPLIT: dict[str, Any] = {"method": "random_split", "experts": 4, "top_k": 2}


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Path]:
    """``converted("bert")``: the folder of a small model without dropout, converted."""

    def get(name: str) -> Path:
        dense, out = tmp_path / f"{name}-dense", tmp_path / f"{name}-moe"
        text_encoder(name, dense, **dict.fromkeys(_DROPOUT.get(name, _USUAL), 0.0))
        upcycle.convert(str(dense), out, verification={"tokens": 64}, **SPLIT)
        return out

    return get


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_and_its_loss_is_that_of_the_stock_class(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    moe = converted(name)
    recipe = recipe_for(moe, tmp_path, stage={"steps": 8}, saving={"every": 20, "export": True})
    result, said = run(recipe)
    assert losses(recipe)[-1] < losses(recipe)[0] - 0.3
    assert all(line["loss/switch_balance"] > 0 for line in steps(recipe))
    assert any("reads a row as a whole" in line for line in said)
    if name == "bert":
        _, said = run(recipe_for(moe, tmp_path / "alone", stage={"steps": 1}, data={"packing": "alone"}))
        assert not any("reads a row as a whole" in line for line in said)
    stream = open_stream(
        recipe.data, tokenizer_of(moe), length=32, micro_batch=4, rank=0, world_size=1, seed=recipe.seed, masks=True
    )
    batch, model = stream.next_batch(), auto_class(name).from_pretrained(moe).eval()
    assert batch.given is not None
    labels = batch.ids.masked_fill(~batch.mask, -100)
    with torch.no_grad():
        expected = model(input_ids=batch.given, attention_mask=batch.real.long(), labels=labels).loss.item()
        nats = token_losses(packed_forward(model, batch).logits, batch)
    assert nats.shape == (4, 31)
    assert nats.sum().item() / int(batch.mask.sum()) == pytest.approx(expected, rel=1e-5)
    assert losses(recipe)[0] == pytest.approx(expected, rel=1e-4)
    assert result.model
    before, after = SafetensorsFolder(moe), SafetensorsFolder(Path(result.model))
    assert {n: s.shape for n, s in after.specs.items()} == {n: s.shape for n, s in before.specs.items()}
    assert all(not torch.equal(before.read(n), after.read(n)) for n in after.specs if ".experts." in n or "router" in n)


@pytest.mark.long
def test_what_was_trained_is_verified_and_evaluated(converted: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_for(converted("bert"), tmp_path, stage={"steps": 40}, saving={"every": 50, "export": True})
    result, _ = run(recipe)
    assert result.model
    assert upcycle.verify(result.model, source=str(tmp_path / "bert-dense")).promise == "trained"
    found = upcycle.evaluate(
        result.model, reference=tmp_path / "bert-dense", text=str(tmp_path / "text.jsonl"), tokens=48
    )
    assert found.texts[0].nats_per_token < 0.8 * found.texts[0].reference_nats_per_token


@pytest.mark.long
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(converted: Callable[..., Path], tmp_path: Path) -> None:
    moe = converted("bert")
    whole = recipe_for(moe, tmp_path / "whole")
    run(whole)
    parts = recipe_for(moe, tmp_path / "parts").model_copy(update={"data": whole.data})
    run(parts)
    newest = latest(tmp_path / "parts" / "run")
    assert newest
    shutil.rmtree(newest.folder)  # as if it had ended at step 4
    run(parts)
    assert losses(parts)[-2:] == losses(whole)[-2:]
    first, second = (latest(tmp_path / name / "run") for name in ("whole", "parts"))
    assert first
    assert second
    one, other = (SafetensorsFolder(found.folder) for found in (first, second))
    assert one.specs
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.specs)


@pytest.mark.slow
def test_passes_and_ranks_change_nothing_but_rounding(converted: Callable[..., Path], tmp_path: Path) -> None:
    moe = converted("bert")
    whole = recipe_for(moe, tmp_path / "whole", micro_batch=4, global_batch=4)
    run(whole)
    single = whole.model_copy(update={"micro_batch": 1, "output": str(tmp_path / "single")})
    run(single)
    assert losses(single) == pytest.approx(losses(whole), rel=1e-4)
    both = two_ranks(whole, tmp_path / "both", micro_batch=2)
    on_ranks(both, 2)
    assert losses(both) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.long
def test_a_parent_teaches_what_it_predicts_of_masked_tokens(converted: Callable[..., Path], tmp_path: Path) -> None:
    moe = converted("bert")
    stage = {"steps": 4, "distillation": {"logits": 1.0, "hidden": 0.5}}
    recipe = recipe_for(moe, tmp_path, stage=stage, saving={"every": 20, "export": False})
    run(recipe)
    found = steps(recipe)
    parent, student = (load_model(folder, encoder=True) for folder in (tmp_path / "bert-dense", moe))
    stream = open_stream(
        recipe.data, tokenizer_of(moe), length=32, micro_batch=4, rank=0, world_size=1, seed=recipe.seed, masks=True
    )
    batch = stream.next_batch()
    with torch.no_grad():
        p, q = (packed_forward(model, batch).logits[batch.mask].log_softmax(-1) for model in (parent, student))
    assert found[0]["loss/kl"] == pytest.approx(((p - q) * p.exp()).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.long
def test_keys_that_do_not_go_with_the_model_are_refused(
    converted: Callable[..., Path], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    moe = converted("bert")
    cached = recipe_for(moe, tmp_path / "a", stage={"distillation": {"logits": 1.0, "cache": str(tmp_path / "c")}})
    with pytest.raises(UsageError, match=r"distillation\.cache keeps what a parent says of a row"):
        run(cached)
    recipe = recipe_for(pico("llama"), tmp_path / "b", stage={"losses": {}}, data={"masking": {"fraction": 0.2}})
    with pytest.raises(UsageError, match=r"data\.masking is for masked language models"):
        run(recipe)
    text_encoder("xlm-roberta", tmp_path / "classifier")
    with pytest.raises(UsageError, match="is an encoder without a head for masked tokens"):
        run(recipe_for(tmp_path / "classifier", tmp_path / "d"))
    text_encoder("roberta", tmp_path / "roberta")
    with pytest.raises(UsageError, match="rows of 62 tokens are longer than the model's context of 61"):
        run(recipe_for(tmp_path / "roberta", tmp_path / "e", length=62, stage={"losses": {}}))
