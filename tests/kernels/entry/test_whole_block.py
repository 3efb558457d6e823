"""When a block that runs as a whole must run its own code: it is watched, its parts are not its own, or a compiler reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from expert_cases import apart
from stock_block_cases import make_block, make_model, tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import upcycle
from upcycle.trainers.routing.router_records import capture

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
OF_SHARED = ("act_fn", "gate_proj", "up_proj", "down_proj")
PARTS = ("gate", "experts", "shared_expert", "shared_expert_gate")


@needs_compiler
@pytest.mark.parametrize("part", [*PARTS, *(f"shared_expert.{name}" for name in OF_SHARED)])
def test_a_hook_on_any_part_sees_it_run(part: str, calls: list[Any]) -> None:
    block, x = make_block(), tokens(1, 2, 20)
    mine, seen = upcycle.use_kernels(deepcopy(block)), []
    module = mine.get_submodule(part)
    with torch.no_grad():
        expected = block(x)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: seen.append(part))
            assert apart(mine(x), expected) < 1e-5
            assert seen, "it ran"
            assert not calls
            handle.remove()
            seen.clear()
        module.forward = lambda *_, own=module.forward, **__: seen.append(part) or own(*_, **__)
        mine(x)
        assert seen
        assert not calls
        del module.forward
        mine(x)
    assert len(calls) == 1


@needs_compiler
def test_a_hook_that_changes_the_router_is_obeyed(calls: list[Any]) -> None:
    block, x = make_block(), tokens(1, 2, 20)
    mine = upcycle.use_kernels(deepcopy(block))
    with torch.no_grad():
        before = mine(x)
        for one in (block, mine):
            one.gate.register_forward_hook(lambda _, __, made: (made[0], made[1].flip(1), made[2].flip(0)))
        assert apart(mine(x), block(x)) < 1e-5
        assert not torch.equal(mine(x), before)
    assert len(calls) == 1


@needs_compiler
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_router_logits_are_recorded_when_asked_for_and_only_then(name: str, calls: list[Any]) -> None:
    model, ids = make_model(name), torch.arange(5)[None]
    with torch.no_grad():
        expected = model(ids, output_router_logits=True).router_logits
        upcycle.use_kernels(model)
        model(ids)
        blocks = len(calls)
        found = model(ids, output_router_logits=True).router_logits
        assert len(calls) == blocks
        model(ids)
        assert len(calls) == 2 * blocks, "hooks that were left behind do nothing"
        model(ids, output_hidden_states=True)
    assert blocks == len(found) == len(expected)
    assert all(apart(mine, stock) < 1e-5 for mine, stock in zip(found, expected, strict=True))


@needs_compiler
def test_the_trainers_records(calls: list[Any]) -> None:
    model, ids = upcycle.use_kernels(make_model("qwen2_moe")), torch.arange(5)[None]
    with torch.no_grad(), capture(model) as recorder:
        model(ids)
        assert len(recorder.take()) == 1
    assert not calls


@contextmanager
def _watched_by_a_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@needs_compiler
@pytest.mark.parametrize(
    ("watch", "most"),
    [
        (lambda: FlopCounterMode(display=False), 1e-5),
        (lambda: torch.autocast("cpu", torch.bfloat16), 0.02),
        (_watched_by_a_hook, 1e-5),
    ],
    ids=["flops", "autocast", "hook"],
)
def test_who_watches_or_changes_every_operation(watch: Callable[[], Any], most: float, calls: list[Any]) -> None:
    block, x = make_block(), tokens(1, 2, 20)
    mine, made = upcycle.use_kernels(deepcopy(block)), []
    for one in (block, mine):
        with torch.no_grad(), watch() as mode:
            made.append(one(x))
            if isinstance(mode, FlopCounterMode):
                assert mode.get_total_flops()
    assert not calls
    assert made[0].dtype == made[1].dtype
    assert apart(made[1], made[0]) < most


@needs_compiler
def test_function_transforms(calls: list[Any]) -> None:
    """A call's own parameters; and none is batched, whose numbers are not where a tensor says."""
    block, x = make_block(), tokens(1, 2, 20)
    mine, made = upcycle.use_kernels(deepcopy(block)), []
    for one in (block, mine):
        values = {name: 2 * value.detach() for name, value in one.named_parameters()}
        made.append(torch.func.functional_call(one, values, (x,)).detach())
    assert apart(made[1], made[0]) < 1e-5
    assert len(calls) == 1
    with torch.no_grad(), pytest.raises(RuntimeError):  # stock experts cannot be batched, either
        torch.func.vmap(mine)(tokens(3, 1, 1, 20))
    assert len(calls) == 1


@pytest.mark.one_in(4)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradients", [False, True])
def test_compiles_whole(backend: str, gradients: bool, calls: list[Any]) -> None:
    torch._dynamo.reset()
    block, x = make_block(), tokens(1, 3, 20)
    mine = upcycle.use_kernels(deepcopy(block))
    with nullcontext() if gradients else torch.no_grad():
        compiled = torch.compile(mine, fullgraph=True, backend=backend)
        found, expected = compiled(x), block(x)
        assert apart(found, expected) < 1e-5
        if gradients:
            inputs = [
                (one, torch.autograd.grad(out.sum(), list(one.parameters())))
                for one, out in ((block, expected), (mine, found))
            ]
            assert all(apart(b, a) < 1e-5 for a, b in zip(inputs[0][1], inputs[1][1], strict=True))
    assert not calls


@pytest.mark.long
@needs_compiler
def test_a_compiled_models_blocks_can_be_switched(calls: list[Any]) -> None:
    torch._dynamo.reset()
    block, x = make_block(), tokens(1, 3, 20)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        expected = compiled(x)
        upcycle.use_kernels(block)
        assert apart(compiled(x), expected) < 1e-5
        assert apart(block(x), expected) < 1e-5
        assert len(calls) == 1
        upcycle.use_kernels(block, off=True)
        assert apart(compiled(x), expected) < 1e-5


class Elsewhere(torch.Tensor):
    """Its numbers need not lie where its address says, as those of quantised or divided weights."""


class Adapted(nn.Linear):
    """What adapters and quantisers put in place of a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _subclass(block: Any) -> None:
    block.experts.down_proj = nn.Parameter(block.experts.down_proj.data.as_subclass(Elsewhere))


def _adapter(block: Any) -> None:
    adapted = Adapted(20, 28, bias=False)
    adapted.load_state_dict(block.shared_expert.up_proj.state_dict())
    block.shared_expert.up_proj = adapted


def _parametrized(block: Any) -> None:
    nn.utils.parametrize.register_parametrization(block.experts, "down_proj", Doubled())


def _biased(block: Any) -> None:
    block.shared_expert.down_proj.bias = nn.Parameter(torch.ones(20))


def _half(block: Any) -> None:
    block.double()


@needs_compiler
@pytest.mark.parametrize("change", [_subclass, _adapter, _parametrized, _biased, _half])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_parts_that_are_not_its_own(change: Callable[[Any], None], before: bool, calls: list[Any]) -> None:
    """Changed before kernels are asked for, or while they are in use."""
    block, x = make_block(), tokens(1, 2, 20)
    mine = deepcopy(block)
    if before:
        change(mine)
    upcycle.use_kernels(mine)
    with torch.no_grad():
        if not before:
            mine(x)
            calls.clear()
            change(mine)
        change(block)
        x = x.to(block.gate.weight.dtype)
        assert apart(mine(x).as_subclass(torch.Tensor), block(x).as_subclass(torch.Tensor)) < 1e-5
    assert not calls


@needs_compiler
def test_offloaded_weights(calls: list[Any]) -> None:
    """Accelerate's hooks bring every part's weights for its own call alone."""
    accelerate = pytest.importorskip("accelerate")
    for first in (True, False):
        block, x = make_block(), tokens(1, 2, 20)
        mine = deepcopy(block)
        if first:
            upcycle.use_kernels(mine)
        accelerate.cpu_offload(mine, execution_device=torch.device("cpu"))
        if not first:
            upcycle.use_kernels(mine)
        with torch.no_grad():
            assert apart(mine(x), block(x)) < 1e-5
    assert not calls


@needs_compiler
def test_memory_that_comes_and_goes(calls: list[Any]) -> None:
    """As of weights that are divided among ranks between two uses: their shape stays, their memory does not."""
    block, x = make_block(), tokens(1, 2, 20)
    mine = upcycle.use_kernels(deepcopy(block))
    weight = mine.experts.gate_up_proj
    with torch.no_grad():
        first = mine(x)
        storage, numbers = weight.untyped_storage(), weight.clone()
        size = storage.nbytes()
        storage.resize_(0)

        def bring(*_: Any) -> None:
            storage.resize_(size)
            weight.copy_(numbers)

        handle = mine.experts.register_forward_pre_hook(bring)
        assert apart(mine(x), block(x)) < 1e-5
        handle.remove()
        assert len(calls) == 1
        assert torch.equal(mine(x), first)
    assert len(calls) == 2


@needs_compiler
def test_noise_in_training(calls: list[Any]) -> None:
    """Mixtral jitters the input of its blocks in training, also without gradients."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=20, intermediate_size=12, num_local_experts=4, router_jitter_noise=0.5)
    config._experts_implementation = "eager"
    block: Any = upcycle.use_kernels(MixtralSparseMoeBlock(config))
    for parameter in block.parameters():
        parameter.data.normal_()
    with torch.no_grad():
        assert not torch.equal(block.train()(tokens(1, 1, 20)), block(tokens(1, 1, 20)))
        assert not calls
        block.eval()(tokens(1, 1, 20))
        assert len(calls) == 1
