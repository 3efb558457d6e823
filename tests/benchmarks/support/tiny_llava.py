"""A tiny LLaVA of real parts: the demo model reads what a vision transformer makes of handwritten digits; made on first use.

Both towers are trained ones (``digits_vit.py``, and the model that comes with upcycle). The connector between them is random, as
before a LLaVA's first stage; it has as many numbers in the middle as the text model's stream, which is LLaVA's own form.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from digits_vit import digits, digits_vit
from smollm2 import cache_folder

from upcycle.files.locate import locate

PATCHES = 16  # of 2 x 2 pixels, which is how many tokens an image is
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def make(folder: Path) -> None:
    """Put the parts together, and save them."""
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration, ViTModel

    demo = locate("demo").path
    text: Any = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    tower: Any = ViTModel.from_pretrained(digits_vit(), hidden_dropout_prob=0.0)  # so that losses can be compared
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_id=text.config.vocab_size - 1,  # its row is never read: images stand there
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copyfile(demo / name, folder / name)


def tiny_llava() -> Path:
    """The folder of the model."""
    folder = cache_folder() / "tiny-llava"
    if not (folder / "tokenizer.json").exists():
        make(folder)
    return folder


def captioned(folder: Path, count: int) -> dict[str, torch.Tensor]:
    """Held-out digits with a line of text each, as the model reads them; labels are those of the text behind the image."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    images, classes = digits()[1]
    lines = [
        tokenizer(f" is a handwritten digit {WORDS[c]}.", add_special_tokens=False).input_ids for c in classes[:count]
    ]
    longest = max(map(len, lines))
    ids = torch.zeros(count, PATCHES + longest, dtype=torch.int64)
    ids[:, :PATCHES] = config.image_token_id
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for row, line in enumerate(lines):
        end = PATCHES + len(line)
        ids[row, PATCHES:end] = labels[row, PATCHES:end] = torch.tensor(line)
        mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images[:count], "labels": labels}
