"""Operations per token against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from upcycle.trainers.forecast.flops import measured_peak, training_flops

LENGTH = 16


def counted(model: Any, backward: bool) -> float:
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / LENGTH


def with_eager_attention(model: Any) -> Any:
    """Eager attention computes all pairs, masked ones too, as two products the counter sees."""
    model.set_attn_implementation("eager")
    return model.train()


@pytest.mark.parametrize("name", ["llama", "llama-rope"])
def test_flops_of_a_dense_model_are_those_that_torch_counts(pico: Callable[[str], Path], name: str) -> None:
    from upcycle.architectures.stock import load_stock_model

    model = with_eager_attention(load_stock_model(pico(name)))
    found = training_flops(model, LENGTH)
    config = model.config
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 4)
    attention = 2 * config.num_hidden_layers * width * LENGTH  # half of all pairs: causal
    assert found.forward + attention == pytest.approx(counted(model, False))
    # Gradients of the embeddings are no products, and those of the attention count all pairs in torch's counter.
    assert found.total + 3 * attention == pytest.approx(counted(model, True), rel=0.01)


def test_flops_count_the_chosen_experts_alone(stock: Callable[..., Any]) -> None:
    two, four = (training_flops(stock("mixtral", experts=4, top_k=k), LENGTH) for k in (2, 4))
    model = stock("mixtral", experts=4, top_k=2)
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    assert four.forward - two.forward == pytest.approx(2 * experts / 2)
    assert four.weights - two.weights == pytest.approx(2 * experts / 2)


def test_flops_leave_out_weight_gradients_of_frozen_parts(stock: Callable[..., Any]) -> None:
    model = stock("mixtral")
    everything = training_flops(model, LENGTH)
    for name, weight in model.named_parameters():
        weight.requires_grad_("gate.weight" in name)
    routers = training_flops(model, LENGTH)
    assert routers.forward == everything.forward
    assert routers.weights == 2 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_a_peak_is_measured() -> None:
    assert measured_peak(torch.device("cpu"), torch.float32) > 1e8
