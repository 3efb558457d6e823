"""Builds and loads pico MoEs, and those inside classes with other parts, as any user would. Tests import it as ``any_moe``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pico_models import MOE_COMMON, MOE_PARTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

STORED_TRANSPOSED = ("qwen3_vl_moe",)  # in published files, which transformers reads and does not write


def auto_of(model_type: str) -> Any:
    """The Auto class that loads a model with its head, and with all parts if it has several."""
    return AutoModelForMultimodalLM if model_type in MOE_PARTS else AutoModelForCausalLM


def moe_settings(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What the configuration of a pico MoE is made of."""
    whole = {**MOE_COMMON, **changes}
    return {"text_config": whole, **MOE_PARTS[model_type]} if model_type in MOE_PARTS else whole


def auto_class_of(folder: Path) -> Any:
    """The Auto class that loads a folder."""
    return auto_of(json.loads((folder / "config.json").read_text())["model_type"])


def text_of(config: Any) -> Any:
    """The stock configuration of the MoE: of a model of parts, that of its text model."""
    return getattr(config, "text_config", config)


def transpose_experts(folder: Path) -> None:
    """Store the matrices of all experts with inputs before outputs."""
    path = folder / "model.safetensors"
    tensors = {k: v.mT.contiguous() if ".experts." in k else v for k, v in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
