"""Documents in one row do not see each other in stock models, or it is said why they do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from wrapped_models import SMALL, small_model, wrapped

from upcycle.errors import UsageError
from upcycle.registry import TARGETS
from upcycle.trainers.data.packed_attention import check_fits, packed_forward, packing_leak
from upcycle.trainers.data.packing import PackedBatch, layout

pytestmark = pytest.mark.one_in(5)  # the other cases are long

CAUSAL = [name for name, (_, kind, _) in SMALL.items() if kind == "CausalLM"]
PARTS = [5, 1, 9, 4]  # and padding


def packed(rows: int, parts: list[int] = PARTS) -> PackedBatch:
    positions, mask = layout(np.array(parts), sum(PARTS) + 3)
    ids = torch.randint(4096, (rows, len(positions)), generator=torch.Generator().manual_seed(1))
    positions = torch.from_numpy(positions).expand(rows, -1)
    return PackedBatch(ids, torch.from_numpy(mask).expand(rows, -1), positions, ("x",) * rows)


def logits(model: Any, batch: PackedBatch) -> torch.Tensor:
    return model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits


def alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    parts = ids[:, : sum(PARTS)].split(PARTS, dim=1)
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], 1)


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_a_packed_document_is_the_document_alone_or_the_leak_is_named(target: str, stock: Callable[..., Any]) -> None:
    model = stock(target).eval()
    batch = packed(rows=2)
    expected = alone(model, batch.ids)
    error = (logits(model, batch)[:, : sum(PARTS)] - expected).norm() / expected.norm()
    if packing_leak(model.config, rows=2) is None:
        assert error < 1e-5
    else:
        assert error > 1e-3, "a leak that is none"
        padded, size = packed(2, parts=[sum(PARTS)]), sum(PARTS)
        expected = model(input_ids=padded.ids[:, :size], use_cache=False).logits
        error = (logits(model, padded)[:, :size] - expected).norm() / expected.norm()
        assert error < 1e-5, "packing: alone"


@pytest.mark.parametrize("name", [*CAUSAL, "falcon-alibi"])
@torch.no_grad()
def test_documents_of_wrapped_models_are_apart_or_the_leak_is_named(name: str) -> None:
    changes = {"alibi": True} if name == "falcon-alibi" else {}
    model = wrapped(small_model(name.removesuffix("-alibi"), vocab_size=4096, **changes), pieces=4).eval()
    batch = packed(rows=2)
    expected = alone(model, batch.ids)
    error = (packed_forward(model, batch).logits[:, : sum(PARTS)] - expected).norm() / expected.norm()
    if packing_leak(model.config, rows=2) is None:
        assert error < 1e-5
    else:
        assert error > 1e-3, "a leak that is none"
    assert packed_forward(model, batch, last=2).logits.shape == (2, 2, 4096)


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
@torch.no_grad()
def test_a_cache_would_leak_and_flat_rows_do_not(target: str, stock: Callable[..., Any]) -> None:
    model = stock(target).eval()
    batch = packed(rows=1)
    expected = alone(model, batch.ids)
    with_cache = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=True).logits
    assert (with_cache[:, : sum(PARTS)] - expected).norm() / expected.norm() > 1e-3
    flat = packed(rows=2).flat()
    rows = logits(model, packed(rows=2))
    assert torch.allclose(logits(model, flat).view_as(rows), rows, atol=1e-5 * rows.abs().max().item())


def test_flash_attention_is_for_one_row() -> None:
    config = SimpleNamespace(_attn_implementation="flash_attention_2", layer_types=None, model_type="mixtral")
    assert packing_leak(config, 1) is None
    assert "batch of one row, and micro_batch is 4" in str(packing_leak(config, 4))


def test_rows_and_tokenizers_that_do_not_fit_are_refused() -> None:
    config = SimpleNamespace(max_position_embeddings=64, vocab_size=3)
    check_fits(config, "abc", 64)
    with pytest.raises(UsageError, match="rows of 65 tokens are longer than the model's context of 64"):
        check_fits(config, "abc", 65)
    with pytest.raises(UsageError, match="the tokenizer has 4 tokens, but the model has embeddings for 3"):
        check_fits(config, "abcd", 64)
