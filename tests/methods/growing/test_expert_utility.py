"""The utility of experts against what autograd, the stock model's own router logits and plain loops give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import EnvironmentFault
from upcycle.methods.growing import expert_utility
from upcycle.progress import SILENT

Models = Callable[..., Path]


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(4096, (3, 24), generator=torch.Generator().manual_seed(4))


def measured(folder: Path, utility: str, windows: torch.Tensor | None) -> dict[int, np.ndarray]:
    return expert_utility.expert_utility(MoeCheckpoint.open(str(folder)), utility, windows, SILENT)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_norm(name: str, fused: bool, pico_moe: Models) -> None:
    found = measured(pico_moe(name, fused), "norm", None)
    weights = AutoModelForCausalLM.from_pretrained(pico_moe(name), dtype=torch.float64).state_dict()
    for layer in range(2):
        experts = [
            tensor.numpy() for key, tensor in weights.items() if f"layers.{layer}." in key and ".experts." in key
        ]
        for e in range(4):
            expected = np.sqrt(sum((matrices[e] ** 2).sum() for matrices in experts))
            np.testing.assert_allclose(found[layer][e], expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_load(name: str, pico_moe: Models, windows: torch.Tensor) -> None:
    found = measured(pico_moe(name), "load", windows)
    model: Any = AutoModelForCausalLM.from_pretrained(pico_moe(name), dtype=torch.float32)
    with torch.no_grad():
        logits = model(windows, output_router_logits=True).router_logits
    assert sorted(found) == ([1] if name == "qwen2_moe" else [0, 1])
    for layer, scores in zip(sorted(found), logits, strict=True):
        counts = np.zeros(4)
        for token in scores.numpy():
            for e in sorted(range(4), key=lambda e, token=token: -token[e])[:2]:
                counts[e] += 1
        assert np.array_equal(found[layer], counts)
        assert counts.sum() == 2 * windows.numel()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("utility", ["saliency", "gradient"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoe", "glm4_moe"])
def test_gradients(name: str, utility: str, pico_moe: Models, windows: torch.Tensor) -> None:
    found = measured(pico_moe(name), utility, windows)
    model: Any = AutoModelForCausalLM.from_pretrained(pico_moe(name), dtype=torch.float64)
    model.set_experts_implementation("eager")
    logits = model(windows).logits
    cross_entropy(logits[:, :-1].reshape(-1, 4096), windows[:, 1:].reshape(-1)).backward()
    for layer, values in found.items():
        tensors = [p for n, p in model.model.layers[layer].named_parameters() if ".experts." in n]
        assert len(tensors) == 2
        for e in range(4):
            expected = 0.0
            for tensor in tensors:
                w, g = tensor[e].detach().numpy(), tensor.grad[e].numpy()
                expected += (np.abs(w * g) if utility == "saliency" else g**2).sum()
            # The gradient is fp32, through two layers: some hundred roundings of 6e-8 in every number, most of which cancel.
            np.testing.assert_allclose(values[e], expected, rtol=1e-5)


def test_an_expert_that_is_never_chosen_is_worth_nothing(pico_moe: Models, tmp_path: Path) -> None:
    one = torch.zeros(1, 2, dtype=torch.long)
    found = measured(pico_moe("mixtral"), "saliency", one)
    assert any((values == 0).any() for values in found.values())
    assert all(np.isfinite(values).all() for values in found.values())


def test_copies_go_where_the_text_says(pico_moe: Models, tmp_path: Path) -> None:
    keys = {
        "method": "expert_upcycling",
        "experts": 5,
        "parameters": {"utility": "load"},
        "calibration": {"text": "demo", "tokens": 256, "window": 64},
        "verification": {"tokens": 64},
    }
    result = upcycle.convert(str(pico_moe("mixtral")), tmp_path / "out", **keys)
    for layer in result.layers:
        assert sum(layer["utility"]) == 2 * 256
        assert layer["experts"][4] == int(np.argmax(layer["utility"]))
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["calibration"]["tokens"] == 256
    assert result.plan.calibration_tokens == 256
    stored = load_file(pico_moe("mixtral") / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    best = result.layers[1]["experts"][4]
    block = "model.layers.1.block_sparse_moe.experts"
    assert torch.equal(written[f"{block}.4.w3.weight"], stored[f"{block}.{best}.w3.weight"])


def test_too_little_memory_is_said_before_the_model_is_loaded(
    pico_moe: Models, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_utility, "available_memory", lambda: 0)
    with pytest.raises(EnvironmentFault, match="measured with the model in memory") as caught:
        measured(pico_moe("mixtral"), "saliency", windows)
    assert "utility=norm" in (caught.value.hint or "")
