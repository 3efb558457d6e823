"""LoRA folders written by peft itself, with random matrices that are large enough for an error to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def write_lora(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Save an adapter of ``base``; ``settings`` are those of peft's ``LoraConfig``."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(stock(base), LoraConfig(**{"r": 4, "lora_alpha": 12, **settings}))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    """The stock model of a folder, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    """What a model says about a fixed text, fp64."""
    ids = (torch.arange(40).view(2, 20) * 7 + 3) % 4096
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found.double()


def unmerged(base: Path, adapter: Path) -> torch.Tensor:
    """The logits of the base with the adapter beside its weights, by peft."""
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(stock(base), adapter))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """``||one - other|| / ||other||``."""
    return float((one - other).norm() / other.norm())


def change_settings(folder: Path, **changes: Any) -> None:
    """Overwrite keys of ``adapter_config.json``."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Any) -> None:
    """Overwrite the weights by what ``change`` makes of them."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
