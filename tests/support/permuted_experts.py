"""A stock MoE with its experts in another order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from upcycle.architectures.stored_moe import MoeModel, expert_index
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

PERMUTED = [3, 1, 0, 2]
COUNTED = ("experts", "expert biases", "router", "router bias", "bias")


def permuted(source: Path, folder: Path) -> Path:
    """The same model with its experts in another order."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    model = MoeModel.read(
        json.loads((folder / "config.json").read_text()), MoeCheckpoint.open(str(folder)).store.specs, ""
    )
    changed = {}
    for name, tensor in tensors.items():
        role, expert = model.role(name), expert_index(name)
        if role == "expert":
            assert expert is not None
            place = PERMUTED.index(expert)
            changed[name.replace(f".experts.{expert}.", f".experts.{place}.")] = tensor
        else:
            changed[name] = tensor[PERMUTED].contiguous() if role in COUNTED else tensor
    assert set(changed) == set(tensors)
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder
