"""Runs pico models of parts as any user would load them. Tests import it as ``tower_runs``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pico_towers import IMAGE
from transformers import AutoModelForMultimodalLM

from upcycle.registry import load


def loaded(folder: Path) -> Any:
    """A folder loaded as any user would, with nothing missing and nothing left over."""
    model, report = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def with_image(model: Any, wrapper: str) -> dict[str, torch.Tensor]:
    """A text with a random image, as the stock class takes it."""
    inputs = load("wrapper", wrapper).sample(model.config, torch.Generator().manual_seed(7))
    read = model.get_image_features if "pixel_values" in inputs else model.get_audio_features
    found = read(**inputs).pooler_output
    count = sum(each.numel() for each in found) // model.config.text_config.hidden_size
    ids = torch.tensor([[*range(5, 15), *[IMAGE] * count, *range(20, 40)]])
    name = load("wrapper", wrapper).typed
    typed = {name: (ids == IMAGE).long()} if name else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs, **typed}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error, by norms."""
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))
