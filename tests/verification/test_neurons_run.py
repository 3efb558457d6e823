"""What ran is counted where a rule decides it, token by token, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, GPT2Config

import upcycle.models  # noqa: F401
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.relu import ReluRule
from upcycle.verification.neurons_run import NeuronsRun

D, WIDTHS, SHARED = 16, (8, 4, 12), 6


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=D, n_layer=2, n_head=2, vocab_size=50, n_positions=32, n_inner=30)
    ffn = ReplacedFfn(
        (("h.0.mlp",), ("h.1.mlp",)), D, "gelu_new", False, frozenset(), WIDTHS, SHARED, False, ReluRule()
    )
    made: torch.nn.Module = AutoModel.from_config(wrapped_config(config, [ffn])).eval()
    return made


@torch.no_grad()
def test_neurons_are_counted_per_token_and_layer() -> None:
    made, seen = model(), list[torch.Tensor]()
    blocks = [module for module in made.modules() if isinstance(module, MoeBlock)]
    for block in blocks:
        block.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    running = NeuronsRun(made, 30)
    with running.counted():
        made(torch.arange(24).view(2, 12))
        expected = []
        for block, x in zip(blocks, list(seen), strict=True):
            on = (x @ block.router.weight.T > 0).double() @ torch.tensor(WIDTHS, dtype=torch.float64)
            expected.append((on + SHARED).mean().item() / 30)
        blocks[0](torch.randn(50, D))  # a pass through a block alone does not count
    made(torch.zeros(1, 5, dtype=torch.long))  # nor does what comes behind
    assert running.shares == pytest.approx(expected)
    assert min(expected) < max(expected) < 1


@torch.no_grad()
def test_other_models_have_no_shares() -> None:
    dense = AutoModel.from_config(GPT2Config(n_embd=D, n_layer=1, n_head=2, vocab_size=50))
    running = NeuronsRun(dense, 30)
    with running.counted():
        dense(torch.zeros(1, 5, dtype=torch.long))
    assert running.shares == []
