"""Training models of upcycle's own class: as stock MoEs are trained, and what comes out is used as any conversion is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from training_runs import recipe_for, run, steps
from wrapped_models import SMALL, inputs_of, relative_error, small_model, wrapped

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.locate import DEMO_FOLDER
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.distillation.losses import capture_outputs, layer_outputs
from upcycle.trainers.optimizing.parameter_groups import select
from upcycle.trainers.routing.stock_routers import find_routers, moe_layers, unread_warning

pytestmark = pytest.mark.one_in(12)  # the other cases are long

CAUSAL = [name for name, (_, kind, _) in SMALL.items() if kind == "CausalLM"]
NO_DROPOUT = {"gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), "opt": {"dropout": 0.0}}
SPLIT: dict[str, Any] = {"method": "random_split", "experts": 4, "top_k": 2}
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2}


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Path]:
    """``converted("gpt2", **keys)``: the folder of a small model, converted."""

    def get(name: str, **keys: Any) -> Path:
        dense, out = tmp_path / f"{name}-dense", tmp_path / f"{name}-moe"
        small_model(name, vocab_size=4096, **NO_DROPOUT.get(name, {})).save_pretrained(dense)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO_FOLDER / "model" / file, dense / file)
        upcycle.convert(str(dense), out, verification={"tokens": 64}, **(keys or SPLIT))
        return out

    return get


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt", "falcon", "bloom", "phi"])
def test_a_run_balances_routers_and_its_export_loads_by_stock_code(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    moe = converted(name)
    recipe = recipe_for(moe, tmp_path, saving={"every": 9, "export": True})
    result, said = run(recipe)
    lines = steps(recipe)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(line["loss/switch_balance"] >= 0.0199 for line in lines)  # two layers, each at least 1, times 0.01
    assert all(len(line["load_max_over_mean"]) == 2 for line in lines)
    leaks = [line for line in said if "does not see where a document begins" in line]
    assert len(leaks) == (name == "bloom")
    assert result.model
    before, after = SafetensorsFolder(moe), SafetensorsFolder(Path(result.model))
    assert {n: (s.shape, s.dtype) for n, s in after.specs.items()} == {
        n: (s.shape, s.dtype) for n, s in before.specs.items()
    }
    assert all(not torch.equal(before.read(n), after.read(n)) for n in after.specs if ".experts." in n or "router" in n)


@pytest.mark.long
def test_what_was_trained_is_verified_evaluated_written_with_and_published(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    moe = converted("gpt2")
    result, _ = run(recipe_for(moe, tmp_path, stage={"steps": 2}, saving={"every": 9, "export": True}))
    out, plan = str(result.model), "license: apache-2.0"
    (tmp_path / "text.txt").write_text("the cat sat on a mat and saw that it was all red " * 40)
    for arguments in (
        ["verify", out, "--source", str(tmp_path / "gpt2-dense")],
        ["evaluate", out, "--reference", str(tmp_path / "gpt2-dense"), "--text", str(tmp_path / "text.txt")],
        ["generate", out, "--prompt", "the cat", "--tokens", "3"],
        ["report", out, "--tokens", "64"],
        ["card", out, "--license", "apache-2.0"],
        ["push", out, "you/moe", "--dry-run"],
    ):
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, f"{arguments}\n{done.output}\n{done.exception!r}"
    card = (Path(out) / "README.md").read_text()
    assert "import upcycle.models" in card
    assert "library_name: upcycle" in card
    assert plan in card


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"zero": {"stage": stage}} for stage in (0, 2, 3, 1)] + [{"dtype": "bfloat16"}])
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(
    settings: dict[str, Any], converted: Callable[..., Path], tmp_path: Path
) -> None:
    moe = converted("gpt2")
    whole = recipe_for(moe, tmp_path / "whole", **settings)
    run(whole)
    parts = recipe_for(moe, tmp_path / "parts", **settings).model_copy(update={"data": whole.data})
    run(parts)
    newest = latest(tmp_path / "parts" / "run")
    assert newest
    shutil.rmtree(newest.folder)  # as if it had ended at step 4
    result, said = run(parts)
    assert any("continuing" in line for line in said)
    assert result.step == 6
    first, second = latest(tmp_path / "whole" / "run"), latest(tmp_path / "parts" / "run")
    assert first
    assert second
    assert first.state["files"] == second.state["files"]  # SHA-256 of all weights and optimizer states


@pytest.mark.parametrize("name", CAUSAL)
def test_outputs_of_layers_are_recorded_from_both(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MoE's FFN outputs are what its blocks gave; as copies, they are the dense model's, whose FFN may be three modules."""
    dense = small_model(name)
    copies, made = wrapped(dense, experts=3), list[torch.Tensor]()
    forward = MoeBlock.forward

    def noting(self: MoeBlock, *arguments: Any, **named: Any) -> torch.Tensor:
        made.append(forward(self, *arguments, **named))
        return made[-1].clone()

    monkeypatch.setattr(MoeBlock, "forward", noting)
    recorders = [capture_outputs(model) for model in (copies, dense)]
    with torch.no_grad():
        for model in (copies, dense):
            model(**inputs_of(name))
    of_copies, of_dense = (layer_outputs(recorder.take()) for recorder in recorders)
    assert len(of_copies) == len(of_dense) == len(made) == 2
    for one, other, expected in zip(of_copies, of_dense, made, strict=True):
        assert torch.equal(one.ffn, expected.view_as(one.hidden))
        assert relative_error(other.ffn, one.ffn) < 2e-6
        assert relative_error(other.hidden, one.hidden) < 2e-6


@pytest.mark.long
@pytest.mark.parametrize("name", ["opt", "gpt2", "falcon"])
def test_copies_have_nothing_to_learn_from_their_parent(
    name: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    distillation = {"parent": "auto", "logits": 1.0, "hidden": 1.0, "ffn": 1.0, "next_token": 0.0}
    stage = {"steps": 1, "losses": {}, "distillation": distillation}
    recipe = recipe_for(converted(name, **COPIES), tmp_path / "copies", stage=stage)
    run(recipe)
    (line,) = steps(recipe)
    assert all(line[f"loss/{loss}"] < 1e-6 for loss in ("kl", "hidden", "ffn")), line
    shutil.rmtree(tmp_path / f"{name}-moe")
    shutil.rmtree(tmp_path / f"{name}-dense")
    recipe = recipe_for(converted(name), tmp_path / "split", stage=stage)
    run(recipe)
    (line,) = steps(recipe)
    assert all(line[f"loss/{loss}"] > 1e-4 for loss in ("kl", "hidden", "ffn")), line


@pytest.mark.long
def test_identical_experts_raise_the_alarm(converted: Callable[..., Path], tmp_path: Path) -> None:
    moe = converted("gpt2", **COPIES)
    recipe = recipe_for(moe, tmp_path, stage={"steps": 2, "train": ["rest"]}, alarms={"identical_after": 1})
    _, said = run(recipe)
    assert any("identical" in line or "copies" in line for line in said), said


def test_routers_of_other_rules_train_without_balance() -> None:
    model = wrapped(small_model("gpt2"), pieces=4, rule=DynamicKRule())
    assert moe_layers(model) == []
    assert [(place.index, place.count) for place in find_routers(model)] == [(0, 4), (1, 4)]
    assert "trains as it is, without balance" in str(unread_warning(model))
    assert set(select(model, ["router"]).values()) == {"router"}
    assert {name.split(".")[3] for name, weight in model.named_parameters() if weight.requires_grad} == {"mlp"}


def test_a_loss_on_routers_of_other_rules_is_refused(converted: Callable[..., Path], tmp_path: Path) -> None:
    moe = converted("gpt2")
    config = json.loads((moe / "config.json").read_text())
    for entry in config["replaced_ffns"]:
        entry["routing"] = {"rule": "dynamic_k"}
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"losses.switch_balance: upcycle_moe has experts, but what its routers do"):
        run(recipe_for(moe, tmp_path, stage={"steps": 1}))
    recipe = recipe_for(moe, tmp_path, stage={"steps": 4, "losses": {}})
    result, _ = run(recipe)  # no gradient reaches the routers
    assert result.step == 4
    newest = latest(tmp_path / "run")
    assert newest
    shutil.rmtree(newest.folder)
    result, _ = run(recipe)
    assert result.step == 4
    again = latest(tmp_path / "run")
    assert again
    assert again.state["files"] == newest.state["files"]


def test_relu_routers_become_sparse(converted: Callable[..., Path], tmp_path: Path) -> None:
    """From all of 4 experts to about 1 per token; a continued run knows its coefficient."""
    moe = converted("gpt2", method="random_split", experts=4, target="upcycle_moe", routing="relu", router="zero")
    losses = {"relu_l1": {"coefficient": 0.01, "experts": 1.0, "factor": 1.5}}
    recipe = recipe_for(moe, tmp_path, stage={"steps": 40, "losses": losses, "learning_rate": 0.02})
    _, said = run(recipe)
    experts = [line["experts_per_token"] for line in steps(recipe)]
    assert experts[0] == 4
    assert min(experts) < 2
    assert any("experts 4.00 per token" in line for line in said)
    newest = latest(tmp_path / "run")
    assert newest
    rises = sum(1 if each > 1 else -1 for each in experts)
    assert newest.state["losses"]["relu_l1"]["coefficient"] == pytest.approx(0.01 * 1.5**rises)


def test_what_experts_do_not_give_one_by_one_is_refused(converted: Callable[..., Path], tmp_path: Path) -> None:
    stage = {"distillation": {"parent": "auto", "output_norms": 1.0}}
    with pytest.raises(UsageError, match="asks every expert for its output"):
        run(recipe_for(converted("gpt2"), tmp_path, stage=stage))
