"""Sounds of every sample width are read to the same samples, and what cannot be read is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from media_cases import RATE, write_sound

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.inputs.sounds import SoundItem, held_sound, sound_files


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_are_what_was_written(width: int, tmp_path: Path) -> None:
    samples = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    write_sound(tmp_path / "a.wav", samples, width=width)
    found = SoundItem("a", tmp_path / "a.wav").read(RATE)
    assert found.shape == (500,)
    # Half a step of the numbers that are stored, and that the largest number is one step below 1.
    assert (found - samples.mean(1)).abs().max() <= 2 * 2.0 ** -(8 * width - 1) + 1e-6


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sound(tmp_path / "slow.wav", torch.zeros(10), rate=8000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    write_sound(tmp_path / "empty.wav", torch.zeros(0))
    (tmp_path / "other.flac").write_bytes(b"fLaC")
    items = {item.name: item for item in sound_files(tmp_path)}
    assert list(items) == ["broken.wav", "empty.wav", "other.flac", "slow.wav"]
    for name, message in (
        ("slow.wav", r"slow\.wav: the sound has 8,000 samples per second, and the model reads 16,000"),
        ("broken.wav", r"broken\.wav: the sound cannot be read"),
        ("empty.wav", r"empty\.wav: the sound is empty"),
    ):
        with pytest.raises(UsageError, match=message):
            items[name].read(RATE)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(EnvironmentFault, match="read by soundfile, which is not installed"):
        items["other.flac"].read(RATE)
    with pytest.raises(UsageError, match="is no folder, and this model reads sounds"):
        sound_files(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="has no sounds"):
        sound_files(tmp_path / "none")


def test_rows_of_datasets_are_sounds_in_two_forms() -> None:
    class Decoder:
        def get_all_samples(self) -> object:
            return type("Samples", (), {"sample_rate": 8000, "data": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})

    for found in (Decoder(), {"array": [[1.0, 2.0], [3.0, 4.0]], "sampling_rate": 8000}):
        made = held_sound(found)
        assert made is not None
        assert made[0] == 8000
        assert made[1].tolist() == [2.0, 3.0]
    assert held_sound({"path": "a.wav"}) is None
