"""Folders of tiny models that read sounds, or images and text, with their processors, and folders of what they read."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import torch
from encoder_cases import image_folder, text_encoder, with_image_processor
from wrapped_models import SMALL

from upcycle.files.locate import DEMO_FOLDER

RATE = 16_000  # samples per second


def two_towers(name: str, folder: Path) -> Any:
    """Write a small model of images and text with its tokenizer and image processor; return the model."""
    settings = SMALL[name][2]
    ends = {**settings["text_config"], "eos_token_id": 1}  # of the tokenizer: where CLIP reads the vector of a text
    model = text_encoder(name, folder, text_config=ends)
    with_image_processor(folder, model.config.vision_config)
    return model


def sound_model(name: str, folder: Path) -> Any:
    """Write a small model that reads sounds with its feature extractor (and tokenizer); return the model."""
    model = text_encoder(name, folder)
    settings: dict[str, Any] = {"sampling_rate": RATE}
    if name == "whisper":  # 32 frames of 500 samples are a second
        settings |= {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": 1,
                     "hop_length": 500, "n_fft": 1000}  # fmt: skip
    else:
        settings |= {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def write_sound(path: Path, samples: torch.Tensor, rate: int = RATE, width: int = 2) -> None:
    """Write samples ``[T]`` or ``[T, channels]`` from -1 to 1 as a .wav of whole numbers of ``width`` bytes."""
    rows = samples[:, None] if samples.dim() == 1 else samples
    numbers = (rows.double() * (2.0 ** (8 * width - 1) - 1)).round().long()
    numbers = numbers + 128 if width == 1 else numbers
    content = b"".join(int(n).to_bytes(width, "little", signed=width > 1) for n in numbers.flatten().tolist())
    with wave.open(str(path), "wb") as file:
        file.setnchannels(rows.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)


def sound_folder(folder: Path, count: int = 20, spoken: bool = True) -> Path:
    """Write noisy tones of about a third of a second, and a text beside each if ``spoken``; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    for i in range(count):
        length = int(torch.randint(4000, 6000, (1,), generator=generator))
        tone = torch.sin(torch.arange(length) * (0.02 + 0.01 * i))
        write_sound(folder / f"{i:03d}.wav", 0.3 * tone + 0.1 * torch.randn(length, generator=generator).clamp(-3, 3))
        if spoken:
            (folder / f"{i:03d}.txt").write_text(f"tone number {i}, {'and more of it ' * (i % 3)}", encoding="utf-8")
    return folder


def captioned_images(folder: Path, each: int = 12) -> Path:
    """Write images with a caption beside each; return the folder."""
    for number, path in enumerate(sorted(image_folder(folder, each=each).rglob("*.png"))):
        path.with_suffix(".txt").write_text(
            f"picture {number} of {path.parent.name}{', bright' * (number % 2)}", encoding="utf-8"
        )
    return folder


def pair_file(path: Path, count: int = 120) -> Path:
    """Write rows of two columns, ``question`` and ``answer``; return the file."""
    rows = [
        {"question": f"what is {i} plus {i % 7}? " * (1 + i % 3), "answer": f"it is {i + i % 7}, " * (1 + i % 2)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def with_processor(folder: Path) -> Path:
    """Save, beside a LLaVA of 4,104 tokens, the processor that its class has, with the demo's tokenizer and one token more."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, patch_size=4, **strategy).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    token = tokenizer.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": token}))
    return folder
