"""Finds sound files in folders, and reads them as samples of one channel."""

from __future__ import annotations

import hashlib
import wave
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import EnvironmentFault, UsageError

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_KIND = f"name a folder of {', '.join(SOUND_SUFFIXES)} files"  # a hint
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # bytes of a sample -> how it is stored


@dataclass(frozen=True)
class SoundItem:
    """A sound that is read when it is wanted.

    Attributes:
        name: its path below its folder, or its place in a dataset, for messages.
        path: its file; None: it is in memory.
        held: samples per second and the samples ``[T]``, where it is in memory.
    """

    name: str
    path: Path | None = None
    held: tuple[int, torch.Tensor] | None = None

    @cached_property
    def sha256(self) -> str:
        """The hash of the file, or of the samples where there is none."""
        if self.held is not None:
            return hashlib.sha256(self.held[1].numpy().tobytes()).hexdigest()
        assert self.path is not None
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(f"{self.path}: the sound cannot be read: {error.strerror}") from None

    def read(self, rate: int) -> torch.Tensor:
        """Return fp32 samples ``[T]`` from -1 to 1, the mean of all channels.

        Raises:
            UsageError: it is no sound, is damaged, is empty, or has another number of samples per second than ``rate``.
            EnvironmentFault: its format needs a package that is missing.
        """
        found, samples = self.held or self._file()
        where = self.path or self.name
        if found != rate:
            raise UsageError(
                f"{where}: the sound has {found:,} samples per second, and the model reads {rate:,}",
                hint=f"resample it first: ffmpeg -i IN -ar {rate} OUT.wav",
            )
        if not samples.numel():
            raise UsageError(f"{where}: the sound is empty", hint="remove the file, or replace it")
        return samples

    def _file(self) -> tuple[int, torch.Tensor]:
        assert self.path is not None
        try:
            return _wave(self.path) if self.path.suffix.lower() == ".wav" else _other(self.path)
        except EnvironmentFault:
            raise
        except Exception as error:  # damaged files raise errors of many kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.path}: the sound cannot be read: {first}", hint="remove the file, or replace it"
            ) from None


def _wave(path: Path) -> tuple[int, torch.Tensor]:
    """Read a file of whole numbers by Python alone, and one of other numbers as other formats."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            content = file.readframes(file.getnframes())
    except wave.Error as error:
        if "unknown format" in str(error):
            return _other(path)
        raise
    content = content[: len(content) // (width * channels) * (width * channels)]
    if width == 3:  # no dtype is as long: the lowest byte is left empty
        rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3)
        samples = torch.cat([torch.zeros(len(rows), 1, dtype=torch.uint8), rows], 1).flatten().view(torch.int32)
        width = 4
    else:
        samples = torch.frombuffer(bytearray(content), dtype=_BITS[width]) if content else torch.zeros(0)
    numbers = samples.float() - 128 if width == 1 else samples.float()
    return rate, (numbers / 2.0 ** (8 * width - 1)).view(-1, channels).mean(1)


def _other(path: Path) -> tuple[int, torch.Tensor]:
    try:
        import soundfile  # type: ignore[import-not-found]
    except ImportError:
        raise EnvironmentFault(
            f"{path}: sounds of this format are read by soundfile, which is not installed",
            hint="pip install soundfile, or write it as .wav of 16 bits: ffmpeg -i IN OUT.wav",
        ) from None
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return int(rate), torch.from_numpy(samples).mean(1)


def held_sound(found: Any) -> tuple[int, torch.Tensor] | None:
    """Return rate and samples ``[T]`` of a sound in a row of a dataset, or None: it is something else.

    Datasets give an array beside its rate, or since version 4 a decoder.
    """
    if hasattr(found, "get_all_samples"):
        made = found.get_all_samples()
        return int(made.sample_rate), torch.as_tensor(made.data).float().mean(0)
    if isinstance(found, dict) and "array" in found and "sampling_rate" in found:
        samples = torch.as_tensor(found["array"]).float()
        return int(found["sampling_rate"]), samples.mean(0) if samples.dim() == 2 else samples
    return None


def sound_files(folder: Path) -> list[SoundItem]:
    """Return all sounds in a folder and in those below it, in the order of their names.

    Raises:
        UsageError: it is no folder, or there are none.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder, and this model reads sounds", hint=_KIND)
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUND_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UsageError(f"{folder} has no sounds in it or in the folders below it", hint=_KIND)
    return [SoundItem(path.relative_to(folder).as_posix(), path) for path in found]
