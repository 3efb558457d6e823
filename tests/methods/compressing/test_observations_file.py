"""The file of observations: any safetensors reader reads it, and upcycle reads what is asked for and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layer_sources import random_observations
from safetensors.torch import load_file

from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.methods.compressing import observations_file
from upcycle.methods.compressing.observations import STREAMS, Observations
from upcycle.methods.compressing.observations_file import OBSERVED, ObservationsWriter
from upcycle.methods.compressing.observed_layer import LayerObservations

LAYERS = (0, 3, 12)


def layers() -> dict[int, LayerObservations]:
    """Odd numbers of fp32 numbers, behind which fp64 ones must begin at a multiple of 8 bytes all the same."""
    return {
        i: replace(random_observations(5, i, tokens=7), neurons=torch.arange(5.0 * (3 + i)).view(5, -1)) for i in LAYERS
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    about = Observations({}, "of these weights", 2, {"text": ["ä", "b"]}, torch.zeros(0)).about_file()
    with ObservationsWriter(tmp_path / "seen", about, len(OBSERVED) * len(LAYERS) + 1) as file:
        for layer, seen in layers().items():
            file.write_layer(layer, seen)
        file.write(STREAMS, torch.eye(4).double())
    return tmp_path / "seen"


def test_other_readers_and_ours_find_the_same_numbers(path: Path) -> None:
    theirs, ours = load_file(path), Observations.read(path)
    assert (ours.model, ours.top_k, ours.text) == ("of these weights", 2, {"text": ["ä", "b"]})
    assert torch.equal(ours.streams, torch.eye(4).double())
    assert [*ours.layers] == [*LAYERS]
    for layer, seen in layers().items():
        for name in OBSERVED:
            expected, found = getattr(seen, name), getattr(ours.layers[layer], name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), name
            assert torch.equal(theirs[f"{layer}.{name}"], expected), name
    assert ours.layers[3].experts == 5
    file = SafetensorsFile(path)  # numbers begin where readers that map them need them
    assert not [name for name, spec in file.specs.items() if spec.dtype == "float64" and file.first_byte(name) % 8]


def test_what_is_not_asked_for_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, own = [], SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name: [read.append(name), own(file, name)][1])
    seen = Observations.read(path)
    for layer in seen.layers.values():
        _ = layer.load, layer.load
    assert read == [STREAMS, *(f"{layer}.load" for layer in LAYERS)]


def test_few_numbers_are_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observations_file, "_HELD_BYTES", 400)
    seen = Observations.read(path)
    for layer in seen.layers.values():
        for name in OBSERVED:
            getattr(layer, name)
    held = seen.layers._held  # type: ignore[attr-defined]
    assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 400
    assert torch.equal(seen.layers[0].sample_gram, layers()[0].sample_gram)


def test_a_layer_that_is_not_there_and_a_number_that_is_not_finite(path: Path) -> None:
    seen = Observations.read(path)
    with pytest.raises(KeyError):
        seen.layers[1]
    place = SafetensorsFile(path).first_byte("3.load")
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 8)
    broken = Observations.read(path).layers[3]
    assert torch.equal(broken.norm, seen.layers[3].norm)
    with pytest.raises(CheckpointError, match=r"'3\.load' is not finite"):
        _ = broken.load
