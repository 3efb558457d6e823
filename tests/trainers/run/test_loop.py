"""Whole runs on one rank: what they learn, log and keep, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses, recipe_for, run, steps

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.trainers.checkpoints import write
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.checkpoints.write import finished
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.run import loop
from upcycle.trainers.run.step import Stepper

Model = Callable[[str], Path]


@pytest.mark.parametrize(
    ("keep", "zero", "ranks", "wanted"),
    [(False, 3, 2, "unmap"), (False, 3, 1, ""), (False, 1, 2, ""), (True, 3, 2, "keep")],
)
def test_ranks_that_gather_weights_give_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, zero: int, ranks: int, wanted: str
) -> None:
    done: list[str] = []
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: not done.append("keep"))
    monkeypatch.setattr(loop, "unmap_large_blocks", lambda: not done.append("unmap"))
    loop.set_allocator(recipe_for(tmp_path, tmp_path, keep_memory=keep, zero={"stage": zero}), ranks, done.append)
    assert " ".join(done) == wanted


def test_a_run_learns_logs_and_keeps_its_newest_checkpoints(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path)
    result, said = run(recipe)
    found = steps(recipe)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    assert all(line["applied"] and line["gradient_norm"] > 0 for line in found)
    assert all(line["loss/switch_balance"] >= 0.0199 for line in found)  # two layers, each at least 1, times 0.01
    assert all(line["loss/router_z"] > 0 for line in found)
    assert {len(line["load_max_over_mean"]) for line in found} == {2}
    assert found[-1]["tokens"] == result.tokens == 6 * 4 * 32
    assert [path.name for path in finished(tmp_path / "run")] == ["step-00000004", "step-00000006"]
    assert sum(line.startswith("heal ") for line in said) == 6
    assert "dead 0" in next(line for line in said if line.startswith("heal 1/6"))
    assert set(result.validation) == {"cats"}
    assert [line for line in said if line.startswith("data read  cats ")] == said[-1:]


def test_a_run_from_python_with_keys_or_a_file(pico_moe: Model, tmp_path: Path) -> None:
    import upcycle

    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1})
    result = upcycle.train(recipe.model_dump(mode="json"))
    assert result.step == 1
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert upcycle.train(tmp_path / "recipe.yaml").step == 1  # nothing is left to do
    assert upcycle.export(result.output, tmp_path / "out").step == 1


def test_the_loss_is_what_stock_transformers_says(pico_moe: Model, tmp_path: Path) -> None:
    from upcycle.architectures.stock import load_stock_model, load_tokenizer
    from upcycle.trainers.data.batches import open_stream

    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1})
    run(recipe)
    model = load_stock_model(pico_moe("mixtral"))
    stream = open_stream(
        recipe.data, load_tokenizer(pico_moe("mixtral")), length=32, micro_batch=4, rank=0, world_size=1, seed=0
    )
    batch = stream.next_batch()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(4):  # document by document, each alone in its row
            starts = [*torch.nonzero(batch.positions[row] == 0).flatten().tolist(), 32]
            for first, end in pairwise(starts):
                logits = model(batch.ids[row : row + 1, first:end]).logits[0].double().log_softmax(-1)
                for place in range(first + 1, end):
                    if batch.mask[row, place]:
                        total -= float(logits[place - first - 1, batch.ids[row, place]])
                        count += 1
    assert losses(recipe)[0] == pytest.approx(total / count, rel=1e-5)


def test_stages_train_what_they_name(pico_moe: Model, tmp_path: Path) -> None:
    stages = [
        {"name": "router", "train": ["router"], "steps": 2, "learning_rate": 0.1},
        {"name": "experts", "train": ["experts"], "steps": 2, "learning_rate": 0.01},
    ]
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stages=stages, saving={"keep": 5})
    run(recipe)
    from upcycle.files.formats.tensor_files import SafetensorsFolder

    before = SafetensorsFolder(pico_moe("mixtral", fused=True))  # type: ignore[call-arg]
    first, second = (SafetensorsFolder(path) for path in finished(tmp_path / "run"))

    def changed(one: SafetensorsFolder, two: SafetensorsFolder) -> set[str]:
        return {name for name in two.specs if not torch.equal(one.read(name), two.read(name))}

    assert changed(before, first) == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    experts = {f"model.layers.{layer}.mlp.experts.{name}_proj" for layer in (0, 1) for name in ("gate_up", "down")}
    assert changed(first, second) == experts
    assert [line["stage"] for line in steps(recipe)] == ["router", "router", "experts", "experts"]


@pytest.mark.long
def test_distillation_from_the_parent_brings_the_student_to_it(pico: Model, tmp_path: Path) -> None:
    import upcycle

    moe = tmp_path / "moe"
    upcycle.convert(str(pico("llama")), moe, method="random_split", experts=4, top_k=2, verification={"enabled": False})
    told = {"parent": "auto", "logits": 1.0, "hidden": 0.5, "ffn": 0.5, "next_token": 0.0}
    recipe = recipe_for(moe, tmp_path, stage={"distillation": told, "steps": 10, "losses": {}})
    run(recipe)
    found = steps(recipe)
    for name in ("loss/kl", "loss/hidden", "loss/ffn"):
        assert found[-1][name] < 0.8 * found[0][name]


def test_distilling_the_parent_into_itself_has_nothing_to_do(pico: Model, tmp_path: Path) -> None:
    import upcycle

    moe = tmp_path / "moe"
    upcycle.convert(str(pico("llama")), moe, experts=4, top_k=2, verification={"enabled": False})
    recipe = recipe_for(moe, tmp_path, stage={"distillation": {"hidden": 1.0, "ffn": 1.0}, "steps": 1, "losses": {}})
    run(recipe)
    (line,) = steps(recipe)
    assert abs(line["loss/kl"]) < 1e-6
    assert line["loss/hidden"] < 1e-10
    assert line["loss/ffn"] < 1e-10


def test_balance_by_bias_moves_the_bias_and_a_capacity_drops(pico_moe: Model, tmp_path: Path) -> None:
    from upcycle.files.formats.tensor_files import SafetensorsFolder

    stage = {
        "balance": {"rate": 0.01},
        "control": {"capacity_factor": 0.5, "min_capacity": 1},
        "steps": 3,
        "losses": {},
    }
    recipe = recipe_for(pico_moe("glm4_moe-sigmoid"), tmp_path, stage=stage)
    run(recipe)
    assert all(line["dropped"] > 0.2 for line in steps(recipe))
    saved = latest(Path(recipe.output))
    assert saved
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    before, after = (SafetensorsFolder(folder).read(name) for folder in (pico_moe("glm4_moe-sigmoid"), saved.folder))
    moved = ((after - before) / 0.01).round()
    assert torch.allclose(after - before, 0.01 * moved, atol=1e-6)
    assert 1 <= moved.abs().max() <= 3
    assert saved.state["balance"]["0"] == pytest.approx(after.tolist())


def test_steps_that_are_not_finite_are_skipped_then_the_run_stops(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, bad_steps=1)
    original = Stepper._losses

    def broken(self: Stepper, engine: Any, batch: Any, weight: float, progress: float) -> Any:
        loss, parts, nats, records = original(self, engine, batch, weight, progress)
        bad = math.nan if progress >= 0.5 else 1.0
        return loss * bad, parts, nats * bad, records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "_losses", broken)
        with pytest.raises(UpcycleError, match="not finite 2 steps in a row") as error:
            run(recipe)
    assert error.value.exit_code == 1
    assert "step-00000004" in error.value.message
    (bad,) = (tmp_path / "run").glob("bad-batch-step-00000005-rank-0.safetensors")
    from safetensors.torch import load_file

    assert load_file(bad)["ids.0"].shape == (2, 32)
    lines = steps(recipe)
    assert [line["applied"] for line in lines] == [True, True, True, False, False]
    assert lines[-1]["loss"] is None
    result, _ = run(recipe)  # continues from the checkpoint, whose weights the skipped step did not touch
    assert result.step == 6
    assert all(math.isfinite(loss) for loss in losses(recipe)[4:])


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path)
    original = write.ShardWriter._append

    def full(self: Any, data: Any, previous: Any) -> None:
        if "step-00000004" in str(self._partial):
            raise OSError(28, "No space left on device")
        original(self, data, previous)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write.ShardWriter, "_append", full)
        with pytest.raises(EnvironmentFault, match="disk is full") as error:
            run(recipe)
    assert error.value.exit_code == 4
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step*")] == ["step-00000002"]
    assert run(recipe)[0].step == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1024}, "rows of 1024 tokens are longer than the model's context"),
        ({"global_batch": 6, "micro_batch": 2, "stage": {"train": ["nothing*"]}}, "matches no parameter"),
        ({"zero": {"settings": {"reduce_buckets": 3}}}, "unknown key 'reduce_buckets'"),
        ({"zero": {"settings": {"stage": 3}}}, "other keys of the recipe decide this"),
        ({"zero": {"settings": {"reduce_bucket_size": "many"}}}, "zero.settings.reduce_bucket_size"),
        ({"experts": "fastest"}, "transformers has no 'fastest'"),
        ({"stage": {"losses": {"hoyer": {}}}}, "hoyer is a loss of dense FFNs"),
        ({"stage": {"balance": {}}}, "no bias on its choice"),
        ({"stage": {"distillation": {}}}, "does not say what it was converted from"),
        ({"stage": {"activation": "relu"}}, "is a MoE"),
        ({"expert_parallel": 2}, "does not divide 1 ranks"),
    ],
)
def test_recipes_that_do_not_fit_the_model_are_refused(
    pico_moe: Model, tmp_path: Path, changes: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(recipe_for(pico_moe("mixtral"), tmp_path, **changes))
    assert not finished(tmp_path / "run")


def test_a_broken_row_of_a_later_stage_is_found_before_the_run_has_a_folder(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path)
    later = tmp_path / "later.jsonl"
    later.write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(2000)) + '{"text": "cut')
    second = recipe.stages[0].model_copy(update={"name": "second", "data": DataRecipe(domains={"a": str(later)})})
    two = recipe.model_copy(update={"stages": [recipe.stages[0], second]})
    with pytest.raises(UsageError, match=r"later\.jsonl, line 2001 is not JSON"):
        run(two)
    assert not Path(recipe.output).exists()


def test_a_tracker_that_is_not_installed_is_named(pico_moe: Model, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="trackio is not installed"):
        run(recipe_for(pico_moe("mixtral"), tmp_path, log={"trackers": ["trackio"]}))
