"""Conversations about scikit-learn's handwritten digits, with images beside them; written on first use, and then kept.

Every fifth image is held out (``digits_vit.py``). There are captions, instructions of one and of two turns, pairs of a right and a
wrong answer, and instructions about held-out images. As a program it prints the folder.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from digits_vit import digits
from smollm2 import cache_folder

SIZE, PATCH = 8, 2
ASKED = "Which digit is it?"
SAID = "It is {}."
FILES = ("captions", "instructions", "pairs", "held_out")


def picture(image: torch.Tensor) -> Any:
    """A gray picture of ``[1, 8, 8]`` numbers from -1 to 1, as an image processor with mean and deviation 0.5 gives them back."""
    from PIL import Image

    return Image.fromarray(((image[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())


def questions(digit: int) -> list[tuple[str, str]]:
    """What can be asked about a digit, and the answers."""
    return [
        (ASKED, SAID.format(digit)),
        ("Is it even?", f"{'No' if digit % 2 else 'Yes'}, {digit} is {'odd' if digit % 2 else 'even'}."),
        ("Is it larger than 4?", f"{'Yes' if digit > 4 else 'No'}, it is {digit}."),
        ("What comes after it?", f"After {digit} comes {digit + 1}."),
    ]


def turn(asked: str, said: str) -> list[dict[str, str]]:
    """A question and its answer, as LLaVA's files have them."""
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def make(folder: Path) -> None:
    """Write images and conversations."""
    draw = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
    for part, (images, classes) in zip(("train", "held_out"), digits(), strict=True):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, (image, digit) in enumerate(zip(images, classes.tolist(), strict=True)):
            name = f"{part}/{number}.png"
            picture(image).save(folder / name)
            if part == "held_out":
                rows[part].append(
                    {"image": name, "digit": digit, "conversations": turn(f"<image>\n{ASKED}", SAID.format(digit))}
                )
                continue
            caption = draw.choice(["a handwritten digit {}", "the digit {}", "a small picture of a {}"]).format(digit)
            rows["captions"].append({"image": name, "conversations": turn("<image>", f"{caption}.")})
            (first, answer), *more = draw.sample(questions(digit), 2)
            second = [message for question in more for message in turn(*question)] if number % 2 else []
            rows["instructions"].append({"image": name, "conversations": [*turn(f"<image>\n{first}", answer), *second]})
            wrong = draw.choice([other for other in range(10) if other != digit])
            pair = {"prompt": f"<image>\n{ASKED}", "chosen": SAID.format(digit), "rejected": SAID.format(wrong)}
            rows["pairs"].append({"image": name, **pair})
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def digit_chats() -> Path:
    """The folder of all files."""
    folder = cache_folder() / "digit-chats-1"
    if not (folder / f"{FILES[-1]}.jsonl").exists():
        make(folder)
    return folder


if __name__ == "__main__":
    print(digit_chats())
