"""Tiny models of parts with their processors, and conversations with images to train them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from media_cases import with_processor
from pico_towers import make_tower

SIZE = 16
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def pictured_llava(folder: Path, text: str = "llama", **changes: Any) -> Path:
    """A random LLaVA of three encoder layers with its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tower(folder, "llava", text, vocab_size=4104, image_token_index=4096, **changes)
    return with_processor(folder)


def draw(folder: Path, name: str, colour: tuple[int, int, int], size: tuple[int, int] = (SIZE, SIZE)) -> str:
    """A picture of one colour with some noise."""
    from PIL import Image

    noise = torch.randint(-20, 20, (size[1], size[0], 3), generator=torch.Generator().manual_seed(len(name)))
    pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(folder / name)
    return name


def chats(folder: Path, count: int = 8) -> Path:
    """Conversations as LLaVA's files have them, in ``chats.jsonl``, beside a folder of images."""
    rows = []
    for number in range(count):
        word = list(COLOURS)[number % len(COLOURS)]
        image = draw(folder / "images", f"{number}.png", COLOURS[word])
        rows.append(
            {
                "id": number,
                "image": f"images/{image}",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is picture {number}?"},
                    {"from": "gpt", "value": f"It is {word}."},
                ],
            }
        )
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pictured(folder: Path, wrapper: str) -> Path:
    """A random LLaVA-NeXT or Idefics3, with the processor that its class has."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    make_tower(folder, wrapper, "llama", vocab_size=4104)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    square = {"height": SIZE, "width": SIZE}
    if wrapper == "llava_next":
        pinpoints = [[16, 32], [32, 16], [32, 32]]
        images = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        keys = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor: Any = transformers.LlavaNextProcessor(image_processor=images, tokenizer=tokenizer, **keys)
    else:
        images = transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": SIZE}, max_image_size={"longest_edge": SIZE}, do_image_splitting=False
        )
        processor = transformers.Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=4)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("image_token_index", None)
    (folder / "config.json").write_text(
        json.dumps(config | {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")})
    )
    return folder
