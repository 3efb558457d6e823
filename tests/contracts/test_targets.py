"""What every target promises: pico models of every family convert, load in stock transformers and give the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.errors import RefusalError

UPCYCLED = {"method": "sparse_upcycling", "experts": 4, "top_k": 2}
SPLIT = {"method": "random_split", "experts": 8, "top_k": 8}
SLICED = {"method": "contiguous_split", "experts": 8, "top_k": 8}
SHARED = {"shared": 4}
# pico model, target, keys: every family with each of its targets, split with and without shared experts
CASES: list[tuple[str, str, dict[str, Any]]] = [
    (name, target, keys)
    for name, targets in {
        "llama": ("mixtral", "qwen2_moe"),
        "llama-rope": ("mixtral", "qwen2_moe"),
        "mistral": ("mixtral", "qwen2_moe"),
        "mistral-window": ("mixtral", "qwen2_moe"),
        "qwen2": ("qwen2_moe",),
        "qwen2-windows": ("qwen2_moe",),
        "qwen3": ("qwen3_moe",),
        "qwen3-bias": ("qwen3_moe",),
    }.items()
    for target in targets
    for keys in (UPCYCLED, SPLIT, SLICED, *([SPLIT | SHARED, SLICED | SHARED] if target == "qwen2_moe" else []))
]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of a folder loaded as any user would."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize(
    ("name", "target", "keys"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_stock_transformers_gives_the_dense_logits(
    name: str, target: str, keys: dict[str, Any], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", target=target, verification={"tokens": 128}, **keys)
    assert result.plan.target == target
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    ids = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(3))
    expected, actual = logits(pico(name), ids), logits(tmp_path / "out", ids)
    # fp32, three layers: a few roundings of 6e-8 each; a wrong rope, window or norm gives errors of order one.
    assert torch.linalg.norm(actual - expected) < 2e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize(("name", "keys"), [("llama", UPCYCLED), ("qwen2", SPLIT | SHARED), ("qwen3", SPLIT)])
def test_both_layouts_load_bit_equal(
    name: str, keys: dict[str, Any], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    states = []
    for layout in ("per-expert", "fused"):
        upcycle.convert(str(pico(name)), tmp_path / layout, layout=layout, verification={"tokens": 64}, **keys)
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / layout).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("name", "layers"), [("qwen2", "every-other"), ("qwen3", "except-last:1"), ("llama", [0, 2])])
def test_dense_layers_are_mixed_in(name: str, layers: Any, pico: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", layers=layers, **UPCYCLED)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_only_layers"] == {"every-other": [0, 2], "except-last:1": [2]}.get(str(layers), [1])


def test_config_is_complete_for_old_and_new_loaders(pico: Callable[[str], Path], tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama-rope")), tmp_path / "out", **UPCYCLED)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    dense = AutoConfig.from_pretrained(pico("llama-rope"))
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    assert loaded.rope_parameters == dense.rope_parameters
    assert raw["rope_theta"] == dense.rope_parameters["rope_theta"]
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    assert loaded.tie_word_embeddings is True
    assert loaded.num_local_experts == 4
    assert "auto_map" not in raw


REFUSED = [
    ("llama", {"target": "mixtral", "shared": 4, **SPLIT}, "cannot hold shared experts", "--target qwen2_moe"),
    ("llama", {"target": "mixtral", "layers": [0], **UPCYCLED}, "dense layers", "--target qwen2_moe"),
    ("llama", {"target": "qwen3_moe", **UPCYCLED}, "without norms", "--target mixtral"),
    ("qwen2", {"target": "mixtral", **UPCYCLED}, "biases on the q, k and v", "--target qwen2_moe"),
    ("qwen2-windows", {"target": "mixtral", **UPCYCLED}, "some layers only", "--target qwen2_moe"),
    ("qwen3", {"shared": 4, **SPLIT}, "cannot hold shared experts", "dots1"),
    ("qwen3", {"target": "mixtral", **UPCYCLED}, "per-head query and key norms", "--target qwen3_moe"),
]


@pytest.mark.parametrize(("name", "keys", "what", "hint"), REFUSED)
def test_what_cannot_be_held_is_refused_with_the_target_that_could(
    name: str, keys: dict[str, Any], what: str, hint: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RefusalError, match=what) as caught:
        upcycle.convert(str(pico(name)), tmp_path / "out", **keys)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
