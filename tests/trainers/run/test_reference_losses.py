"""Sheared-LLaMA's reference losses are the dense parent's, on the text that the student is validated on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run, write_text

import upcycle
from upcycle.architectures.stock import load_stock_model as load_stock
from upcycle.errors import UsageError
from upcycle.trainers.checkpoints.prepare_model import tokenizer_of
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.data.batches import open_validation
from upcycle.trainers.recipe.training_recipe import TrainRecipe
from upcycle.trainers.run.step_reports import read_log

Pico = Callable[[str], Path]


@pytest.fixture
def half(pico: Pico, tmp_path: Path) -> Path:
    """A random split of the pico Llama, half of which runs: at its start it is another function than its parent."""
    settings: dict[str, Any] = {"method": "random_split", "experts": 4, "top_k": 2, "verification": {"enabled": False}}
    upcycle.convert(str(pico("llama")), tmp_path / "half", **settings)
    return tmp_path / "half"


def two_domains(model: Path, folder: Path, dynamic: dict[str, Any], **changes: Any) -> TrainRecipe:
    texts = {name: write_text(folder / f"{name}.jsonl", shift=shift) for shift, name in enumerate(("book", "code"))}
    data = {"domains": texts, "dynamic": dynamic, "validation": {"fraction": 0.2, "tokens": 256, "batch": 2}}
    return recipe_for(
        model, folder, stage={"steps": 2, "learning_rate": 1e-3}, data=data, **{"log": {"validation": 1}, **changes}
    )


def restated(folder: Path, recipe: TrainRecipe) -> dict[str, float]:
    """Mean nats of every domain by a stock model, row by row, position by position."""
    model, found = load_stock(folder), {}
    for name, batches in open_validation(recipe.data, tokenizer_of(folder), length=recipe.length).items():
        nats = []
        for batch in batches:
            with torch.no_grad():
                logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits.double()
            for row, position in batch.mask[:, 1:].nonzero().tolist():
                chances = logits[row, position].softmax(-1)
                nats.append(-math.log(chances[batch.ids[row, position + 1]]))
        found[name] = sum(nats) / len(nats)
    return found


@pytest.mark.long
def test_reference_losses_are_the_dense_parents_and_weights_follow_the_excess(
    half: Path, pico: Pico, tmp_path: Path
) -> None:
    recipe = two_domains(half, tmp_path, {"rate": 50.0})
    _, said = run(recipe)
    log = read_log(tmp_path / "run" / "log.jsonl")
    (reference,) = (
        {n: line[f"reference/{n}"] for n in ("book", "code")} for line in log if line["kind"] == "reference"
    )
    # fp32 logits of about 1, with 4096 in a sum: the mean of nats near 8 is right to a few 1e-6.
    assert reference == pytest.approx(restated(pico("llama"), recipe), rel=1e-6)
    assert any(line.startswith("reference, of the parent  book ") for line in said)
    *_, before, last = ([line[f"validation/{n}"] for n in reference] for line in log if line["kind"] == "validation")
    weights = [0.5, 0.5]
    for losses in (before, last):
        weights = [
            w * math.exp(50.0 * max(0.0, loss - ref))
            for w, loss, ref in zip(weights, losses, reference.values(), strict=True)
        ]
        weights = [w / sum(weights) for w in weights]
    saved = latest(tmp_path / "run")
    assert saved
    mixture = saved.state["data"]["mixture"]
    assert list(mixture["weights"].values()) == pytest.approx(weights, rel=1e-9)
    assert mixture["reference"] == reference
    student = restated(half, recipe)
    assert max(abs(student[name] - reference[name]) for name in student) > 1e-4  # else nothing would tell them apart


@pytest.mark.long
def test_later_stages_and_continued_runs_keep_the_reference_losses(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = two_domains(half, tmp_path, {})
    content = recipe.model_dump(mode="json")
    content["stages"] = [{**content["stages"][0], "name": name} for name in ("one", "two")]
    measured = []
    from upcycle.trainers.run import loop

    kept = loop.reference_losses
    monkeypatch.setattr(loop, "reference_losses", lambda *told: measured.append(kept(*told)) or measured[-1])
    run(TrainRecipe.model_validate(content))
    assert len(measured) == 1
    saved = latest(tmp_path / "run")
    assert saved
    assert saved.state["data"]["mixture"]["reference"] == measured[0]


def test_reference_losses_of_the_recipe_need_no_parent(half: Path, tmp_path: Path) -> None:
    (half / "upcycle.json").unlink()
    recipe = two_domains(half, tmp_path, {"reference": {"book": 1.0, "code": 2.0}})
    run(recipe)
    assert not [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "reference"]


@pytest.mark.long
def test_a_parent_that_is_not_known_is_missed_before_anything_is_made(half: Path, pico: Pico, tmp_path: Path) -> None:
    (half / "upcycle.json").unlink()
    with pytest.raises(UsageError, match=r"data.dynamic.parent: .* does not say what it was converted from") as caught:
        run(two_domains(half, tmp_path, {}))
    assert "dynamic.reference" in (caught.value.hint or "")
    assert not (tmp_path / "run").exists()
    run(two_domains(half, tmp_path, {"parent": str(pico("llama"))}))


def test_weights_that_could_not_move_are_refused(half: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"log.validation is 0, so they would never change"):
        two_domains(half, tmp_path, {}, log={"validation": 0})
