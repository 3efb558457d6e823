"""The refit of a dense model made of a MoE against least squares in fp64 (numpy), layer by layer, on whole stock models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_oracle import layers_of, stock, watch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.calibration.compressing import moe_walk, refit_dense
from upcycle.ffn.ridge_sums import UNJUDGED_STRENGTH

Models = Callable[..., Path]
STRENGTH = 0.3


def run(dense: Any, index: int, windows: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """The stream behind one layer of a dense stock model, its FFN's activations, and the FFN's output."""
    layer, seen = layers_of(dense)[index], {}

    def put(key: str, output: bool) -> Any:
        return lambda _, given, made=None: seen.__setitem__(key, made if output else given[0])

    block = layer.get_submodule(name.rpartition(".")[0])
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(put("hidden", False)),
        layer.register_forward_hook(put("after", True)),
        block.register_forward_hook(put("block", True)),
    ]
    with torch.no_grad():
        dense(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    flat = {key: value[0] if isinstance(value, tuple) else value for key, value in seen.items()}
    return {key: value.detach().reshape(-1, value.shape[-1]) for key, value in flat.items()}


@pytest.mark.long
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("dots1", 2048), ("qwen3_moe", 160), ("flex_olmo", 2048), ("qwen2_moe", 2048)],
)  # shared experts; too few windows to hold any out; a norm behind the FFN; a dense layer below
def test_down_projections_are_the_least_squares_solutions(
    name: str, tokens: int, joint: bool, pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = pico_moe(name), []
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 128)
    monkeypatch.setattr(refit_dense, "REFIT_STRENGTHS", (STRENGTH,))
    monkeypatch.setattr(refit_dense, "MOST_JOINT", 4096 if joint else 20)
    real = refit_dense.refit_dense

    def keeping(*given: Any) -> Any:
        read.append(given[6])
        return real(*given)

    monkeypatch.setattr(refit_dense, "refit_dense", keeping)
    keys = {
        "width": 48,
        "calibration": {"text": "demo", "tokens": tokens, "window": 32},
        "verification": {"tokens": 64},
    }
    for refit in ("none", "down"):
        upcycle.convert(str(source), tmp_path / refit, method="to_dense", refit=refit, **keys)
    (windows,) = read
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "none", dtype=torch.float64, attn_implementation="eager")
    written = load_file(tmp_path / "down" / "model.safetensors")
    whole, down, changed = watch(stock(source), windows), "mlp.down_proj", 0
    held = np.arange(windows.numel()) // 32 % 8 == 7
    strength = STRENGTH if held.any() else UNJUDGED_STRENGTH
    for index, uncut in whole.items():
        matrix = layers_of(model.eval())[index].get_submodule(down).weight
        old = matrix.detach().clone()
        for neurons in torch.arange(48).split(4096 if joint else 20):
            made = run(model, index, windows, down)
            left = (uncut.block - made["block"] if name == "flex_olmo" else uncut.after - made["after"]).numpy()
            features = made["hidden"][:, neurons].numpy()
            a, y = features[~held], left[~held]
            scale = strength * np.square(a).sum(0).mean()
            augmented = np.vstack([a, np.sqrt(scale) * np.eye(a.shape[1])])
            update = np.linalg.lstsq(augmented, np.vstack([y, np.zeros((a.shape[1], y.shape[1]))]), rcond=None)[0]
            judged = held if held.any() else ~held
            if np.square((left - features @ update)[judged]).sum() < np.square(left[judged]).sum():
                matrix.data[:, neurons] += torch.from_numpy(update).T
                changed += 1
        new, step = matrix.detach(), torch.dist(matrix.detach(), old)
        found = written[f"model.layers.{index}.{down}.weight"].double()
        assert torch.dist(found, new) <= 1e-3 * step + 1e-6 * torch.linalg.norm(old), index
        matrix.data = found  # what the layers above read
    assert changed
