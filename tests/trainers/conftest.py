"""Tiny random stock models of every target, and records of made-up routers. T tokens, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico_models import COMMON, PICO
from torch import nn

from upcycle.architectures.dense.base import Feature
from upcycle.ffn.moe_shape import MoeShape
from upcycle.models.experts import use_eager_experts
from upcycle.registry import load
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.routing_rule import RoutingRule

Models = Callable[..., Any]


@pytest.fixture(scope="session")
def stock() -> Models:
    """``stock("mixtral", experts=4, top_k=2)``: a new model of the stock class, every weight random, eager experts."""

    def make(target: str, experts: int = 4, top_k: int = 2, **changes: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        for model_type, different in PICO.values():
            if target not in load("family", model_type).targets:
                continue
            dense = load("family", model_type)().config({**COMMON, **different, "model_type": model_type})
            if not load("target", target)().lacks(dense):
                break
        holds = load("target", target).holds
        first = 1 if Feature.DENSE_FIRST in holds else 0
        layers = tuple(range(first, dense.num_hidden_layers))
        shape = MoeShape(experts, top_k, 0, 24, layers)
        keys = {**load("target", target)().full_config(dense, shape, "float32"), **changes}
        config = AutoConfig.for_model(target, **{k: v for k, v in keys.items() if k not in ("model_type", "dtype")})
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.2)
        return use_eager_experts(model)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(4096, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def record() -> Callable[..., RouterRecord]:
    """``record(logits, top_k=2)``: what a router of those logits would be recorded as; fp64 stays fp64."""

    def make(
        logits: torch.Tensor, top_k: int = 2, layer: int = 0, score: Any = "softmax", **extra: Any
    ) -> RouterRecord:
        rule = RoutingRule(score, logits.shape[1], top_k)
        return RouterRecord(layer, logits, *rule.route(logits), rule, **extra)

    return make


class Letters:
    """A tokenizer whose tokens are the characters of a text."""

    bos_token_id = None
    eos_token_id: int | None = 1
    pad_token_id = None

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, Any]:
        one = isinstance(texts, str)
        ids = [[ord(letter) for letter in text] for text in ([texts] if one else texts)]
        return {"input_ids": ids[0] if one else ids}

    def get_vocab(self) -> dict[str, int]:
        return {}


@pytest.fixture
def letters() -> Letters:
    return Letters()
