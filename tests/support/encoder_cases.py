"""Folders of tiny encoders with a tokenizer of single characters, or with an image processor and images."""

from __future__ import annotations

import json
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from wrapped_models import small_model

from upcycle.models.own.moe_block import MoeBlock

SPECIAL = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
SIDE = 8  # pixels of the tiny image models


def text_encoder(name: str, folder: Path, **changes: Any) -> Any:
    """Write a small text encoder with :func:`character_tokenizer`; return the model."""
    model = small_model(name, **changes)
    model.save_pretrained(folder)
    character_tokenizer(folder)
    return model


def character_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single characters that puts ``[CLS]`` and ``[SEP]`` around texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [*SPECIAL, *(string.ascii_letters + string.digits + " .,;:'\"()-_=\n[]{}#*/\\")][:96]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    named = dict(zip(("cls_token", "sep_token", "pad_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)


def image_encoder(name: str, folder: Path, **changes: Any) -> Any:
    """Write a small image encoder with its processor; return the model."""
    model = small_model(name, **changes)
    model.save_pretrained(folder)
    with_image_processor(folder, model.config)
    return model


def with_image_processor(folder: Path, config: Any) -> None:
    """Write the processor that makes images as a configuration describes them."""
    side = getattr(config, "image_size", SIDE)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": side, "width": side},
        "image_mean": [0.5] * config.num_channels,
        "image_std": [0.5] * config.num_channels,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def image_folder(folder: Path, classes: int = 2, each: int = 24, mode: str = "RGB") -> Path:
    """Write random images, ``each`` in the subfolder of every class, which differ in brightness; return the folder."""
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    for label in range(classes):
        place = folder / f"class_{label}"
        place.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = torch.randint(40 + 100 * label, 140 + 100 * label, (12, 10, 3), generator=generator)
            image = Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")
            image.convert(mode).save(place / f"{i:03d}.png")
    return folder


def weighing_alike(model: Any) -> Any:
    """The model with the same weight for all chosen experts, as the fit has them; softmax weights are up to 1% apart."""
    for block in (module for module in model.modules() if isinstance(module, MoeBlock)):

        def route(logits: torch.Tensor, rule: Any = block.router.rule) -> tuple[torch.Tensor, torch.Tensor]:
            ids, weights = rule.route(logits)
            return ids, weights.mean(-1, keepdim=True).expand_as(weights)

        block.router.rule = SimpleNamespace(route_sequences=lambda logits, *_: route(logits))
    return model
