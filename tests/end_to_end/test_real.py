"""SmolLM2-135M-Instruct: exact conversions of a real model, in stock transformers, token for token. Run by ``make real``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from smollm2 import dense_folder, gguf_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle

pytestmark = pytest.mark.real
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Water boils at a temperature of"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return dense_folder()


def generated(folder: Path) -> list[list[int]]:
    """Greedy continuations by stock transformers in fp32; the load report must be empty."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    written = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written.append(model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)[0].tolist())
    return written


def test_upcycled_is_exact_loads_cleanly_and_generates_the_same_tokens(smollm2: Path, tmp_path: Path) -> None:
    result = upcycle.convert(str(smollm2), tmp_path / "out", experts=4, top_k=2, router="random")
    assert result.plan.target == "mixtral"
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.relative_logit_error < 1e-5
    expected, actual = generated(smollm2), generated(tmp_path / "out")
    assert actual == expected
    assert "Paris" in AutoTokenizer.from_pretrained(smollm2).decode(expected[0])


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("method", ["random_split", "contiguous_split"])
def test_splits_with_all_experts_active_are_exact(method: str, shared: int, smollm2: Path, tmp_path: Path) -> None:
    result = upcycle.convert(str(smollm2), tmp_path / "out", method=method, experts=8, top_k=8, shared=shared)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.relative_logit_error < 1e-5
    assert result.plan.target == ("qwen2_moe" if shared else "mixtral")


def test_half_the_experts_are_approximate_with_numbers(smollm2: Path, tmp_path: Path) -> None:
    result = upcycle.convert(str(smollm2), tmp_path / "out", method="random_split", experts=8, top_k=4)
    checked = result.verification
    assert checked is not None
    assert checked.verdict == "approximate"
    assert checked.perplexity > 1.5 * checked.perplexity_dense
    assert checked.all_experts_error is not None
    assert checked.all_experts_error < 1e-5


def test_the_gguf_file_itself_converts(tmp_path: Path) -> None:
    result = upcycle.convert(str(gguf_file()), tmp_path / "out", experts=2, top_k=1)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Ünïcode and code: x += 1")["input_ids"]) == "Ünïcode and code: x += 1"


def test_a_calibrated_split_loads_cleanly_and_is_not_far_from_dense(smollm2: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"method": "alternating", "active": 0.75, "pieces": 96, "layers": "except-first:1"}
    calibration = {"text": "demo", "tokens": 4096, "window": 256}
    result = upcycle.convert(str(smollm2), tmp_path / "out", calibration=calibration, **recipe)
    assert result.plan.target == "qwen2_moe"
    assert result.verification is not None
    # A random split at half of its experts multiplies the perplexity by three thousand.
    assert result.verification.perplexity < 1.5 * result.verification.perplexity_dense
    generated(tmp_path / "out")  # loads without a stray key; which fact survives 4,096 tokens of calibration is chance


@pytest.mark.parametrize(("placement", "verdict"), [("down", "exact"), ("paper", "approximate")])
def test_virtual_groups(placement: str, verdict: str, smollm2: Path, tmp_path: Path) -> None:
    parameters = {"expansion": 2, "granularity": 4, "scale_placement": placement}
    result = upcycle.convert(str(smollm2), tmp_path / "out", method="virtual_groups", parameters=parameters, top_k=4)
    checked = result.verification
    assert checked is not None
    assert checked.verdict == verdict
    if verdict == "exact":
        assert checked.relative_logit_error < 1e-5
        assert generated(tmp_path / "out") == generated(smollm2)
    else:
        # SiLU is not homogeneous: the equal split over gate, up and down changes the function, and the report says how much.
        assert checked.relative_logit_error > 1e-3
        assert "paper" in checked.explanation


def test_a_mix_of_four_identical_sources_is_exact(smollm2: Path, tmp_path: Path) -> None:
    copies = [tmp_path / f"copy{i}" for i in range(4)]
    for copy in copies:
        copy.symlink_to(smollm2)
    result = upcycle.convert(None, tmp_path / "out", method="branch_train_mix", sources=list(map(str, copies)))
    checked = result.verification
    assert checked is not None
    assert checked.verdict == "exact"
    assert checked.relative_logit_error < 1e-5
    assert generated(tmp_path / "out") == generated(smollm2)
