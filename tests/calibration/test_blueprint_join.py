"""Existence is not doneness: a joined blueprint counts when it holds every layer of the job, and parts go after the whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kill_points import Killed, killed_at

from upcycle.calibration.blueprint_join import decided_layer, join_layers, joined_blueprint, keep_layer, layer_file
from upcycle.errors import CheckpointError
from upcycle.ffn.blueprint import BlueprintFile, ExpertSpec, LayerBlueprint
from upcycle.files.output.workspace import CALIBRATION_FOLDER, LAYER_BLUEPRINTS

LAYERS = (0, 2, 11)


def job() -> Any:
    recipe = SimpleNamespace(model_dump=lambda include=None, exclude=(): {"method": "random_split"})
    return SimpleNamespace(shape=SimpleNamespace(moe_layers=LAYERS), recipe=recipe, recipe_keys=None)


def decide(folder: Path, layers: tuple[int, ...] = LAYERS) -> None:
    (folder / CALIBRATION_FOLDER).mkdir(exist_ok=True)
    for layer in layers:
        experts = tuple(ExpertSpec(torch.arange(4) + 4 * number) for number in range(2))
        router = torch.full((2, 3), float(layer))
        keep_layer(folder, LayerBlueprint(layer, routed=experts, shared=(), top_k=1, scale=1.0, router=router))


def test_all_layers_are_joined_and_then_the_parts_go(tmp_path: Path) -> None:
    decide(tmp_path)
    assert joined_blueprint(job(), tmp_path) is None
    join_layers(job(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["blueprint.safetensors"]
    found = joined_blueprint(job(), tmp_path)
    assert found
    assert found.layers == list(LAYERS)
    for layer in LAYERS:
        kept = decided_layer(job(), tmp_path, layer)
        assert kept
        assert kept.router is not None
        assert torch.equal(kept.router, torch.full((2, 3), float(layer)))


def test_a_layer_that_is_missing_is_a_fault_and_not_a_smaller_blueprint(tmp_path: Path) -> None:
    (tmp_path / LAYER_BLUEPRINTS).mkdir()  # an empty folder, as a calibration that has just begun makes it
    with pytest.raises(CheckpointError, match=r"00000.safetensors .* is missing"):
        join_layers(job(), tmp_path)
    decide(tmp_path, LAYERS[1:])
    with pytest.raises(CheckpointError, match=r"00000.safetensors .* is missing"):
        join_layers(job(), tmp_path)
    assert not (tmp_path / "blueprint.safetensors").exists()


def test_a_blueprint_of_some_layers_or_of_half_the_bytes_is_joined_again(tmp_path: Path) -> None:
    decide(tmp_path)
    join_layers(job(), tmp_path)
    whole = (tmp_path / "blueprint.safetensors").read_bytes()
    for content in (whole[:-8], b"", whole.replace(rb"\"11\"", rb"\"12\"")):
        (tmp_path / "blueprint.safetensors").write_bytes(content)
        assert joined_blueprint(job(), tmp_path) is None
        decide(tmp_path)
        join_layers(job(), tmp_path)
        assert (tmp_path / "blueprint.safetensors").read_bytes() == whole


def test_killed_at_any_change_the_join_ends_the_same(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    decide(reference)
    with killed_at(reference, 0) as changes:
        join_layers(job(), reference)
    whole = (reference / "blueprint.safetensors").read_bytes()
    for at in range(1, len(changes) + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        decide(folder)
        with killed_at(folder, at) as done, pytest.raises(Killed):
            join_layers(job(), folder)
        left = [layer for layer in LAYERS if layer_file(folder, layer).exists()]
        assert left == list(LAYERS) or BlueprintFile(folder / "blueprint.safetensors").layers == list(LAYERS), done[-1]
        join_layers(job(), folder)
        assert (folder / "blueprint.safetensors").read_bytes() == whole, done[-1]
        assert not (folder / LAYER_BLUEPRINTS).exists()
