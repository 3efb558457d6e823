"""Expert choice in a decoder: experts choose in training alone, and what is exported writes as it reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from training_runs import recipe_for, run, steps
from transformers import AutoModelForCausalLM
from wrapped_models import small_model

import upcycle
import upcycle.models
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.expert_choice import ExpertChoiceRule
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import capture

E = 4
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
CHOOSING: dict[str, Any] = {"control": {"choice": "expert_choice"}, "losses": {"choice_prediction": {}}}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    dense, out = folder / "dense", folder / "moe"
    small_model("gpt2", vocab_size=4096, **NO_DROPOUT).save_pretrained(dense)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / file, dense / file)
    keys: dict[str, Any] = {"target": "upcycle_moe", "experts": E, "router": "random", "verification": {"tokens": 64}}
    upcycle.convert(str(dense), out, routing={"rule": "causal_choice", "capacity_factor": 1}, **keys)
    return out


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 4000, (2, 12), generator=torch.Generator().manual_seed(seed))


def blocks_in(model: Any) -> list[MoeBlock]:
    return [module for module in model.modules() if isinstance(module, MoeBlock)]


def with_another_end(tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens[:, :8], ids(9)[:, 8:]], 1)


def test_experts_choose_in_training_alone_and_the_export_is_causal(moe: Path, tmp_path: Path) -> None:
    stages = [
        {"name": "choose", "steps": 8, "learning_rate": 0.01, **CHOOSING},
        {"name": "predicted", "steps": 2, "learning_rate": 0.001},
    ]
    recipe = recipe_for(moe, tmp_path, stages=stages, saving={"every": 20, "export": True})
    result, _ = run(recipe)
    lines = steps(recipe)
    assert lines[0]["loss/choice_prediction"] > lines[7]["loss/choice_prediction"]
    assert "loss/choice_prediction" not in lines[8]
    assert all(worst == pytest.approx(1.0) for line in lines[:8] for worst in line["load_max_over_mean"])
    model, report = AutoModelForCausalLM.from_pretrained(
        result.model, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert all(block.router.choice.weight.abs().max() > 0 for block in blocks_in(model))
    # More experts or fewer, without another conversion.
    every = AutoModelForCausalLM.from_pretrained(result.model, routing={"threshold": 0})
    assert all(bool((block.router(torch.randn(5, 32))[2] < E).all()) for block in blocks_in(every))
    tokens = ids()
    with torch.no_grad():
        one, two = model(tokens).logits, model(with_another_end(tokens)).logits
        torch.testing.assert_close(one[:, :8], two[:, :8], rtol=0, atol=1e-5)
        made = [model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
        # The same test does see a model that looks ahead: the one that trains.
        with capture(model.train(), RouterControl(ControlParameters(choice="expert_choice"))):
            one, two = model(tokens).logits, model(with_another_end(tokens)).logits
    assert torch.equal(*made)
    assert (one[:, :8] - two[:, :8]).abs().max() > 1e-3


def test_rows_are_chosen_from_alone_and_padding_never(moe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe).train()
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 7:] = False
    control = RouterControl(ControlParameters(choice="expert_choice"))
    control.rows(real)
    with capture(model, control) as recorder:
        model(ids())
        records = recorder.take()
        model.eval()(ids())
        predicted = recorder.take()
    for record, other in zip(records, predicted, strict=True):
        shares = record.logits.softmax(-1).view(2, 12, E)
        for row, length in enumerate((12, 7)):
            alone = ExpertChoiceRule(1).gates(record.logits.view(2, 12, E)[row, :length])
            assert int((alone > 0).sum()) == E * -(-length // E)
            torch.testing.assert_close(record.gates.view(2, 12, E)[row, :length], alone, rtol=1e-6, atol=0)
        assert not record.chosen.view(2, 12, E)[1, 7:].any()
        assert record.correction is not None
        assert other.correction is None
        if other.layer == records[0].layer:  # by the untaught prediction, all whose share is above the mean
            assert torch.equal(other.chosen.view(2, 12, E) > 0, shares > 1 / E)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"control": {"choice": "expert_choice"}, "losses": {}}, "go together"),
        ({"losses": {"choice_prediction": {}}}, "go together"),
        (
            {**CHOOSING, "control": {"choice": "expert_choice", "capacity_factor": 2}},
            "capacity_factor changes a choice",
        ),
    ],
)
def test_a_recipe_that_teaches_nothing_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, ValidationError), match=message):
        recipe_for(tmp_path, tmp_path, stage=keys)


def test_other_models_and_other_keys_are_refused(moe: Path) -> None:
    """With the reason, before anything trains."""
    model = AutoModelForCausalLM.from_pretrained(moe)
    with pytest.raises(UsageError, match="jitter and expert_dropout go with"):
        capture(model, RouterControl(ControlParameters(choice="expert_choice", dense_gradients=True)))
    with pytest.raises(UsageError, match="as many as their logits say"):
        capture(model, RouterControl(ControlParameters(capacity_factor=1.0)))
    ffn = ReplacedFfn((("h.0.mlp",),), 32, "gelu_new", False, frozenset(), (16,) * E, 0, False, TopKRule(2))
    other = AutoModelForCausalLM.from_config(wrapped_config(small_model("gpt2").config, [ffn]))
    with pytest.raises(UsageError, match="it could not write text"):
        capture(other, RouterControl(ControlParameters(choice="expert_choice")))
