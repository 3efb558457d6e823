"""Small models of two inputs, each trained within a minute or two of one CPU, and what they read: made on first use, and then kept.

- ``restorer``: a T5 that reads a line of the embedded prose without its vowels, and writes the line.
- ``four_digits``: a CLIP of images of four handwritten digits (scikit-learn's) with a caption of their numbers.
- ``dialled``: a Whisper that hears one to four telephone tones in noise, of other lengths and loudness, and writes their digits.

Short examples are among those that are trained on: what to look at is learnt from them first.

As a program it trains them and prints the folders.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2] / "support")]

import torch
from digits_vit import digits
from encoder_cases import character_tokenizer, with_image_processor
from media_cases import RATE, write_sound
from smollm2 import cache_folder

from upcycle.text.reading.plain_text import read_text

WIDE: dict[str, Any] = {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "encoder_layers": 3,
                        "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
ENDS = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # of character_tokenizer
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477)  # hertz, of the keys of a telephone
KEYS = "123456789*0#"
LINE, HELD, CALIBRATED = 48, 240, 600  # characters of a line, examples that are held out, and that splits are fitted on
Batch = dict[str, Any]


@cache
def tokenizer() -> Any:
    """The tokenizer of single characters."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        character_tokenizer(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def ids_of(texts: list[str]) -> torch.Tensor:
    """Token ids ``[N, T]`` of texts, padded."""
    rows = [torch.tensor(tokenizer()(text)["input_ids"]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ENDS["pad_token_id"])


def labels_of(texts: list[str]) -> torch.Tensor:
    """What a decoder learns to write ``[N, T]``; padding is not learned."""
    ids = ids_of(texts)
    return ids.masked_fill(ids == ENDS["pad_token_id"], -100)


def fitted(model: Any, batches: Iterator[Batch], steps: int, rate: float = 2e-3) -> Any:
    """Train a stock model on its own loss."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    started = time.perf_counter()
    for step in range(steps):
        loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"step {step + 1}: {loss:.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return model.eval()


def lines() -> tuple[list[str], list[str]]:
    """Lines of the embedded prose: those to train on, and held-out ones."""
    text = " ".join(read_text("prose").split())
    found = [text[at : at + LINE].strip() for at in range(0, len(text) - LINE, LINE)]
    return [line for i, line in enumerate(found) if i % 10], found[::10]


def without_vowels(line: str) -> str:
    """The line that is read."""
    return "".join(letter for letter in line if letter.lower() not in "aeiou")


def restorer(folder: Path) -> None:
    """Train the T5; write it, and ``train.jsonl`` and ``held.jsonl`` of pairs."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_ff": 256, "d_kv": 16, "num_heads": 4, "num_layers": 3, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(**{**ENDS, **sizes}, decoder_start_token_id=2))
    sides = lines()

    def batches() -> Iterator[Batch]:
        while True:
            length = int(torch.randint(6, LINE + 1, ()))
            texts = [sides[0][int(i)][:length] for i in torch.randint(len(sides[0]), (32,))]
            read = ids_of([without_vowels(text) for text in texts])
            yield {"input_ids": read, "attention_mask": (read != 2).long(), "labels": labels_of(texts)}

    fitted(model, batches(), 1200, 4e-3).save_pretrained(folder)
    for name, side, count in (("train", sides[0], CALIBRATED), ("held", sides[1], HELD)):
        rows = ({"short": without_vowels(line), "line": line} for line in side[:: max(1, len(side) // count)][:count])
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def four(images: torch.Tensor, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures ``[N, 1, 16, 16]`` of four digits, and captions."""
    chosen = torch.randint(len(labels), (count, 4))
    upper, lower = (torch.cat([images[chosen[:, i]], images[chosen[:, i + 1]]], dim=-1) for i in (0, 2))
    return torch.cat([upper, lower], dim=-2), ["".join(str(int(i)) for i in row) for row in labels[chosen]]


def four_digits(folder: Path) -> None:
    """Train the CLIP; write it, and ``train`` and ``held`` folders of pictures with captions."""
    from PIL import Image
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    text = {**sizes, **ENDS, "num_hidden_layers": 3, "max_position_embeddings": 32}
    seen = {**sizes, "num_hidden_layers": 4, "image_size": 16, "patch_size": 4, "num_channels": 3}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=64))
    sides = digits()

    def batches() -> Iterator[Batch]:
        while True:
            pictures, captions = four(*sides[0], 64)
            read = ids_of(captions)
            asked = {"pixel_values": pictures.expand(-1, 3, -1, -1), "return_loss": True}
            yield {"input_ids": read, "attention_mask": (read != 2).long(), **asked}

    fitted(model, batches(), 1500).save_pretrained(folder)
    with_image_processor(folder, model.config.vision_config)
    for name, side, count in (("train", sides[0], CALIBRATED), ("held", sides[1], HELD)):
        place = folder / name
        place.mkdir(exist_ok=True)
        for i, (picture, caption) in enumerate(zip(*four(*side, count), strict=True)):
            grey = ((picture[0] + 1) * 127.5).round().to(torch.uint8).numpy()
            Image.fromarray(grey).convert("RGB").save(place / f"{i:03d}.png")
            (place / f"{i:03d}.txt").write_text(caption, encoding="utf-8")


def dialled_sound(keys: str) -> torch.Tensor:
    """One second ``[16000]`` of telephone tones in noise."""
    parts = [torch.zeros(int(torch.randint(200, 1200, ())))]
    for key in keys:
        place = KEYS.index(key)
        at = torch.arange(int(torch.randint(1800, 2600, ()))) * (2 * torch.pi / RATE)
        loud = 0.1 + 0.15 * torch.rand(())
        parts += [loud * (torch.sin(LOW[place // 3] * at) + torch.sin(HIGH[place % 3] * at))]
        parts += [torch.zeros(int(torch.randint(300, 900, ())))]
    sound = torch.cat(parts)[:RATE]
    sound = torch.nn.functional.pad(sound, (0, RATE - len(sound)))
    return (sound + 0.1 * torch.randn(RATE)).clamp(-1, 1)


def dialled(folder: Path) -> None:
    """Train the Whisper; write it, and ``train`` and ``held`` folders of sounds with their digits."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    settings = {"feature_size": 40, "chunk_length": 1, "hop_length": 250, "n_fft": 1000, "sampling_rate": RATE}
    extractor = WhisperFeatureExtractor(**settings)
    sizes = {**WIDE, **ENDS, "num_mel_bins": 40, "max_source_positions": 32, "max_target_positions": 32}
    free = {"suppress_tokens": None, "begin_suppress_tokens": None, "decoder_start_token_id": 2}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **free))
    torch.manual_seed(1)
    lengths = torch.randint(1, 5, (3000 + HELD,)).tolist()
    numbers = ["".join(str(int(i)) for i in torch.randint(10, (length,))) for length in lengths]
    sounds = [dialled_sound(number) for number in numbers]
    features = torch.tensor(extractor([sound.numpy() for sound in sounds], sampling_rate=RATE)["input_features"])
    labels = labels_of(numbers)

    def batches() -> Iterator[Batch]:
        while True:
            some = torch.randint(3000, (32,))
            yield {"input_features": features[some], "labels": labels[some]}

    fitted(model, batches(), 1200).save_pretrained(folder)
    extractor.save_pretrained(folder)
    for name, start, count in (("train", 0, CALIBRATED), ("held", 3000, HELD)):
        place = folder / name
        place.mkdir(exist_ok=True)
        for i in range(start, start + count):
            write_sound(place / f"{i:04d}.wav", sounds[i])
            (place / f"{i:04d}.txt").write_text(numbers[i], encoding="utf-8")


MAKERS: dict[str, Callable[[Path], None]] = {"restorer": restorer, "four_digits": four_digits, "dialled": dialled}


def trained_tower(name: str) -> Path:
    """The folder of a trained model, with its tokenizer, its processor, and what it reads."""
    folder = cache_folder() / name
    if not (folder / "made").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        started = time.process_time()
        MAKERS[name](folder)
        character_tokenizer(folder)
        (folder / "made").write_text(f"{time.process_time() - started:.0f}")
    return folder


if __name__ == "__main__":
    for each in sys.argv[1:] or MAKERS:
        made = trained_tower(each)
        print(f"{made}: {(made / 'made').read_text()} s of a CPU")
