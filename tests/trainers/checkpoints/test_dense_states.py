"""The dense run's optimizer states in the experts that are its copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run

pytest.importorskip("deepspeed")

import upcycle
from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.trainers.checkpoints.dense_states import DenseStates
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.recipe.training_recipe import TrainRecipe
from upcycle.trainers.run import loop
from upcycle.trainers.run.stage import Stage

KEYS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def dense_run(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    """A dense run of three steps, exported to ``run/model``."""
    folder = tmp_path_factory.mktemp("dense")
    stage = {"steps": 3, "losses": {}}
    recipe = recipe_for(pico("llama"), folder, stage=stage, saving={"every": 10, "export": True})
    run(recipe)
    return recipe


def convert(dense: TrainRecipe, out: Path, **keys: Any) -> Path:
    upcycle.convert(f"{dense.output}/model", out, **{"verification": {"enabled": False}, **keys})
    return out


def dense_state(dense: TrainRecipe, key: str, name: str) -> torch.Tensor:
    saved = latest(Path(dense.output))
    assert saved
    files = [SafetensorsFile(saved.folder / file) for file in saved.state["files"]]
    return next(file for file in files if f"{key}:{name}" in file.specs).read(f"{key}:{name}")


def states(recipe: TrainRecipe, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], int]:
    """What the optimizer has before the first step of a run, by name."""
    found: dict[str, torch.Tensor] = {}
    taken = []

    class Watched(Stage):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            taken.append(self.tensors.steps_taken)
            for tensor in self.tensors.stock_tensors:
                for key in KEYS if tensor.trained else ():
                    found[f"{key}:{tensor.name}"] = self.tensors.state(tensor, key).clone()

    monkeypatch.setattr(loop, "Stage", Watched)
    run(recipe)
    return found, taken[0]


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 3])
def test_experts_begin_with_the_dense_moments(
    dense_run: TrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int
) -> None:
    out = convert(dense_run, tmp_path / "moe", experts=3, top_k=2)
    recipe = recipe_for(out, tmp_path / "r", dense_states=dense_run.output, zero={"stage": zero}, stage={"steps": 1})
    found, steps = states(recipe, monkeypatch)
    assert steps == 3
    for key in KEYS:
        for layer in range(2):
            block = f"model.layers.{layer}.mlp"
            gate, up, down = (
                dense_state(dense_run, key, f"{block}.{name}_proj.weight") for name in ("gate", "up", "down")
            )
            assert gate.abs().max() > 0
            for expert in range(3):
                assert torch.equal(found[f"{key}:{block}.experts.gate_up_proj"][expert], torch.cat([gate, up]))
                assert torch.equal(found[f"{key}:{block}.experts.down_proj"][expert], down)
            assert not found[f"{key}:{block}.gate.weight"].any()
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
            assert torch.equal(found[f"{key}:{name}"], dense_state(dense_run, key, name))


def test_slices_have_the_moments_of_their_neurons(dense_run: TrainRecipe, tmp_path: Path) -> None:
    """A partition whose experts are summed as they are: every neuron's moments, in the order of the neurons."""
    out = convert(dense_run, tmp_path / "moe", method="random_split", experts=4, top_k=4, router="zero", scale=1)
    reused = DenseStates(Path(dense_run.output), out)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        gate = dense_state(dense_run, "exp_avg", f"{block}.gate_proj.weight")
        down = dense_state(dense_run, "exp_avg", f"{block}.down_proj.weight")
        experts = reused.converted(f"{block}.experts.gate_up_proj", "exp_avg")
        downs = reused.converted(f"{block}.experts.down_proj", "exp_avg")
        for expert, spec in enumerate(reused.blueprints.layer(layer).routed):
            for place, neuron in enumerate(spec.neurons.tolist()):
                assert torch.equal(experts[expert, place], gate[neuron])
                assert torch.equal(downs[expert][:, place], down[:, neuron])


def test_weights_that_are_no_plain_copy_are_refused(dense_run: TrainRecipe, tmp_path: Path) -> None:
    noisy = convert(dense_run, tmp_path / "noisy", experts=2, parameters={"noise": 0.1})
    scaled = convert(dense_run, tmp_path / "scaled", method="random_split", experts=4, top_k=4)
    for model in (noisy, scaled):
        with pytest.raises(UsageError, match="not a plain copy or permutation") as error:
            DenseStates(Path(dense_run.output), model)
        assert "leave out dense_states" in str(error.value.hint)


def test_states_of_another_run_or_optimizer_are_refused(
    dense_run: TrainRecipe, converted: Callable[..., Path], pico_moe: Callable[[str], Path], tmp_path: Path
) -> None:
    other = recipe_for(converted("moe", experts=2), tmp_path / "a", dense_states=dense_run.output, stage={"steps": 1})
    with pytest.raises(UsageError, match="was not made from the weights in"):
        run(other)
    stock = recipe_for(pico_moe("mixtral"), tmp_path / "b", dense_states=dense_run.output, stage={"steps": 1})
    with pytest.raises(UsageError, match=r"has no recipe\.yaml"):
        run(stock)
    with pytest.raises(CheckpointError, match="is not a training run with a checkpoint"):
        DenseStates(tmp_path, converted("moe", experts=2))
    momentum = {"optimizer": {"name": "sgd"}, "dense_states": dense_run.output, "stage": {"steps": 1}}
    with pytest.raises(CheckpointError, match="has no 'momentum_buffer:"):
        run(recipe_for(convert(dense_run, tmp_path / "moe", experts=2), tmp_path / "c", **momentum))
