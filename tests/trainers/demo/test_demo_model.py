"""The demo's training loop on a corner of its data."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from upcycle.trainers.demo.demo_model import (
    DemoRecipe,
    learning_rate,
    train_demo_model,
    train_tokenizer,
    training_windows,
)
from upcycle.trainers.demo.demo_text import Document

RECIPE = DemoRecipe(
    seed=0, vocabulary_size=300, context=16, tokens=16 * 4 * 40, batch_windows=4, peak_learning_rate=1e-2, warmup_steps=5,
    weight_decay=0.1, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip


def test_training_lowers_the_loss() -> None:
    documents = [Document("code", f"d{i}", "for x in range(10):\n    print(x)\n" * 20, False) for i in range(3)]
    tokenizer = train_tokenizer(documents, RECIPE)
    assert len(tokenizer) <= 300
    rng = torch.Generator().manual_seed(0)
    windows = training_windows(documents, tokenizer, RECIPE, rng)
    assert windows.shape == (RECIPE.steps * 4, 17)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        )
    )

    def loss() -> float:
        with torch.no_grad():
            return model(windows[:8, :-1], labels=windows[:8, :-1]).loss.item()

    before = loss()
    train_demo_model(model, windows, RECIPE)
    assert loss() < 0.3 * before


def test_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    assert learning_rate(0, RECIPE) == pytest.approx(1e-2 / 5)
    assert learning_rate(5, RECIPE) == pytest.approx(1e-2)
    assert learning_rate(RECIPE.steps, RECIPE) == pytest.approx(1e-3)
