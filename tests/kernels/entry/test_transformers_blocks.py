"""Stock blocks of transformers after ``upcycle.use_kernels``, against their own code: outputs, gradients, on and off."""

from __future__ import annotations

import gc
import logging
import pickle
import shutil
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from expert_cases import apart, rounding
from pico_models import MOE_COMMON
from stock_block_cases import make_block, make_model, tokens

import upcycle
from upcycle.kernels.entry import whole_block
from upcycle.kernels.entry.process_state import forget

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "olmoe", "flex_olmo", "mellum")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_decodes_as_before(name: str, calls: list[Any]) -> None:
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(1))
    model = make_model(name)
    found = []
    for step in range(2):
        if step:
            assert upcycle.use_kernels(model) is model
        with torch.no_grad():
            text = model(ids, use_cache=True)
            assert not calls, "a text is not a few tokens"
            found.append([text.logits, *_decoded(model, ids, text.past_key_values)])
        blocks = sum("experts" in block._modules for block in model.modules())
        assert len(calls) == 4 * blocks * step
    assert all(apart(mine, stock) < 1e-5 for stock, mine in zip(*found, strict=True))


def _decoded(model: Any, ids: torch.Tensor, cache: Any) -> list[torch.Tensor]:
    return [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(4)]


@needs_compiler
@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("shared", [0, 28])
@pytest.mark.parametrize(("experts", "top_k", "hidden"), [(4, 1, 32), (7, 3, 19), (64, 8, 40), (16, 2, 37)])
def test_a_block(
    experts: int, top_k: int, hidden: int, shared: int, normalized: bool, dtype: torch.dtype, calls: list[Any]
) -> None:
    """In bf16, stock code rounds where the kernel does not: both are compared with stock code in fp64 on the same choices."""
    block = make_block(experts, top_k, hidden, 12, shared, normalized).to(dtype)
    mine, exact = upcycle.use_kernels(deepcopy(block)), deepcopy(block).double()
    for count in (1, 2, 8, 16):
        x = tokens(1, count, hidden).to(dtype)
        with torch.no_grad():
            logits, scores, ids = block.gate(x[0])
            chosen = (logits, scores.double(), ids)
            exact.gate.forward = lambda _, chosen=chosen: chosen
            found, expected = mine(x), exact(x.double())
            assert apart(found, expected) < rounding(dtype, hidden + 40)
            assert apart(found, block(x)) < (1e-5 if dtype == torch.float32 else 0.02)
    assert len(calls) == 4
    assert found.shape == x.shape
    assert found.dtype == dtype


@pytest.mark.parametrize("shared", [0, 28])
@pytest.mark.parametrize("count", [3, 40])
def test_gradients_are_stock_codes(count: int, shared: int, calls: list[Any]) -> None:
    block = make_block(shared=shared)
    mine, x, made = upcycle.use_kernels(deepcopy(block)), tokens(1, count, 20).requires_grad_(), []
    for one in (block, mine):
        out = one(x)
        made.append([out, *torch.autograd.grad(out.square().sum(), [x, *one.parameters()])])
    assert all(apart(found, expected) < 1e-5 for expected, found in zip(*made, strict=True))
    assert not calls
    with torch.no_grad():
        assert apart(mine(tokens(2, 40, 20)), block(tokens(2, 40, 20))) < 1e-5
    assert not calls, "80 tokens"


@needs_compiler
def test_frozen_weights_need_no_gradient(calls: list[Any]) -> None:
    block = make_block().requires_grad_(False)
    x = tokens(1, 2, 20)
    expected = block(x)
    mine = upcycle.use_kernels(deepcopy(block))
    assert apart(mine(x), expected) < 1e-5
    assert len(calls) == 1
    mine(x.requires_grad_()).sum().backward()
    assert len(calls) == 1
    assert x.grad is not None


def test_on_twice_and_off_twice() -> None:
    model = make_model("qwen2_moe", "grouped_mm")
    kinds = [type(module) for module in model.modules()]
    for _ in range(2):
        upcycle.use_kernels(model)
        assert model.config._experts_implementation == "upcycle"
    for _ in range(2):
        upcycle.use_kernels(model, off=True)
        assert model.config._experts_implementation == "grouped_mm"
        assert [type(module) for module in model.modules()] == kinds
        assert not [key for module in model.modules() for key in vars(module) if "upcycle" in key]


def test_off_keeps_what_was_chosen_meanwhile() -> None:
    model = upcycle.use_kernels(make_model("qwen3_moe"))
    model.set_experts_implementation("batched_mm")
    assert upcycle.use_kernels(model, off=True).config._experts_implementation == "batched_mm"
    model.set_experts_implementation("upcycle_lean")
    assert upcycle.use_kernels(model).config._experts_implementation == "upcycle_lean"


def test_names_and_keys_stay() -> None:
    block = make_block()
    before = (repr(block), list(block.state_dict()))
    upcycle.use_kernels(block)
    assert (repr(block), list(block.state_dict())) == before


@needs_compiler
@pytest.mark.parametrize("copied", [deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_run_on_kernels_with_their_own_weights(copied: Any, calls: list[Any]) -> None:
    block = upcycle.use_kernels(make_block())
    x = tokens(1, 1, 20)
    with torch.no_grad():
        first = block(x)
        other = copied(block)
        assert torch.equal(other(x), first)
        other.experts.down_proj.zero_()
        assert not torch.equal(other(x), first)
        assert torch.equal(block(x), first)
    assert len(calls) == 4
    assert type(upcycle.use_kernels(other, off=True)) is type(make_block())


@needs_compiler
def test_no_weight_is_kept_alive(calls: list[Any]) -> None:
    block = upcycle.use_kernels(make_block())
    x = tokens(1, 1, 20)
    with torch.no_grad():
        first = block(x)
        held = list(block.named_parameters())
        kept = [weakref.ref(parameter.untyped_storage()) for _, parameter in held]
        for name, parameter in held:
            owner, _, key = name.rpartition(".")
            setattr(block.get_submodule(owner), key, torch.nn.Parameter(parameter.clone()))
        del held, parameter
        gc.collect()
        assert [storage() for storage in kept] == [None] * len(kept)
        assert torch.equal(block(x), first)
        held_block = weakref.ref(block)
    assert len(calls) == 2
    del block
    gc.collect()
    assert held_block() is None
    assert not whole_block._looked_at


@needs_compiler
def test_weights_are_looked_at_again_when_they_change(calls: list[Any]) -> None:
    """Cast, given other numbers, or a router asked for more experts: the next token sees it."""
    block, x = make_block(), tokens(1, 2, 20)
    mine = upcycle.use_kernels(deepcopy(block))

    def same(x: torch.Tensor, count: int, most: float) -> None:
        calls.clear()
        with torch.no_grad():
            assert apart(mine(x), block(x)) < most
        assert len(calls) == count

    same(x, 1, 1e-5)
    for one in (block, mine):
        one.to(torch.bfloat16)
    same(x.bfloat16(), 1, 0.02)
    for one in (block, mine):
        one.double()
    same(x.double(), 0, 1e-12)
    for one in (block, mine):
        one.float()
    same(x, 1, 1e-5)
    for one in (block, mine):
        one.gate.top_k, one.gate.norm_topk_prob = 3, False
    same(x, 1, 1e-5)
    for one in (block, mine):
        one.experts.down_proj.data = one.experts.down_proj.data.flip(0).contiguous()
        one.shared_expert.up_proj.weight.data.mul_(2)
    same(x, 1, 1e-5)
    for one in (block, mine):
        one.shared_expert.act_fn = torch.nn.Tanh()
    same(x, 0, 1e-5)


@needs_compiler
def test_nan_and_infinity_come_out_as_in_stock_code(calls: list[Any]) -> None:
    block, x = make_block(), tokens(1, 4, 20)
    x[0, 1, 3], x[0, 2] = torch.nan, torch.inf
    with torch.no_grad():
        found, expected = upcycle.use_kernels(deepcopy(block))(x), block(x)
    assert calls
    assert torch.equal(found.isnan(), expected.isnan())
    assert apart(found[0, ::3], expected[0, ::3]) < 1e-5


def test_another_dtype_is_stock_codes_error() -> None:
    block = upcycle.use_kernels(make_block())
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        block(tokens(1, 1, 20).bfloat16())


def test_what_is_left_alone_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("granitemoe")
    upcycle.use_kernels(model)
    (record,) = [record for record in caplog.records if record.name == "upcycle.kernels"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "2 blocks GraniteMoeMoE (model.layers.0.block_sparse_moe to model.layers.1.block_sparse_moe) keep their own code around "
        "the experts: only its own code knows what its router does"
    )
    assert model.config._experts_implementation == "upcycle"
    caplog.clear()
    block = make_block()
    block.shared_expert.up_proj = torch.nn.utils.parametrizations.weight_norm(block.shared_expert.up_proj)
    block.forward = block.forward
    model = torch.nn.ModuleList([block, make_block(), make_block()])
    model[1].shared_expert.act_fn = torch.nn.Tanh()
    model[2].shared_expert.down_proj = torch.nn.Linear(28, 20)
    upcycle.use_kernels(model)
    reasons = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert reasons == [
        "its forward function was replaced",
        "its shared expert has an activation of its own",
        "its shared expert has biases",
    ]


def test_experts_without_a_kernel_keep_their_implementation() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss", **{**MOE_COMMON, "vocab_size": 64, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}
    )
    config._experts_implementation = "grouped_mm"
    model = upcycle.use_kernels(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(("variable", "value"), [("UPCYCLE_COMPILE", "0"), ("UPCYCLE_KERNELS", "reference")])
def test_without_compiled_code(variable: str, value: str, monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setenv(variable, value)
    forget()
    block, x = make_block(), tokens(1, 2, 20)
    with torch.no_grad():
        assert apart(upcycle.use_kernels(deepcopy(block))(x), block(x)) < 1e-5
    assert not calls
    forget()
