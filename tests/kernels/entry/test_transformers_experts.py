"""Stock models of transformers with ``experts_implementation="upcycle"`` against their eager experts."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from expert_cases import apart, random_ids
from pico_models import MOE_COMMON, PICO_MOE

from upcycle.kernels.entry import transformers_experts
from upcycle.kernels.entry.process_state import forget
from upcycle.kernels.entry.transformers_experts import register_kernels

MODELS = ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "glm4_moe")
register_kernels()


def test_register_twice() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    first = ALL_EXPERTS_FUNCTIONS["upcycle"]
    register_kernels()
    assert ALL_EXPERTS_FUNCTIONS["upcycle"] is first


def make(name: str, experts: str = "eager") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = PICO_MOE[name]
    config = AutoConfig.for_model(model_type, **{**MOE_COMMON, "vocab_size": 64, **changes})
    config._experts_implementation = experts
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return model.train()


def step(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = model(ids, labels=ids, use_cache=False)
    found.loss.backward()
    return found.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


QUICK = ("compiled", "mixtral")
BACKENDS = {"compiled": "aot_eager", "inductor": "inductor"}
CASES = [
    pytest.param(name, mode, marks=[pytest.mark.slow] if mode in BACKENDS and (mode, name) != QUICK else [])
    for name in MODELS
    for mode in ("plain", "lean", "checkpointed", *BACKENDS)
]


@pytest.mark.one_in(19)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_logits_and_gradients(name: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    model = make(name)
    assert any(hasattr(module, "is_concatenated") for module in model.modules()), "stock experts with the interface"
    logits, gradients = step(model, ids)
    model.set_experts_implementation("upcycle_lean" if mode == "lean" else "upcycle")
    if mode == "checkpointed":
        model.gradient_checkpointing_enable()
    elif mode in BACKENDS:
        torch._dynamo.reset()
        model.model = torch.compile(model.model, backend=BACKENDS[mode])
    mine, slopes = step(model, ids)
    assert apart(mine, logits) < 1e-5
    slopes = {key.replace("_orig_mod.", ""): slope for key, slope in slopes.items()}
    assert slopes.keys() == gradients.keys()
    for key, expected in gradients.items():
        assert apart(slopes[key], expected) < 1e-5, key
    assert not [record for record in caplog.records if "instead" in record.getMessage()]


@pytest.mark.long
def test_from_pretrained(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    make("mixtral").save_pretrained(tmp_path)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        eager, mine = (
            AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name)(ids).logits
            for name in ("eager", "upcycle")
        )
    assert apart(mine, eager) < 1e-5


def experts_of(model_type: str, **changes: Any) -> Any:
    """A stock experts module alone, its numbers random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**MOE_COMMON, "vocab_size": 64, **changes})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module = next(module for module in model.modules() if hasattr(module, "is_concatenated"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return module


def both(module: Any, ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(len(ids), MOE_COMMON["hidden_size"], generator=torch.Generator().manual_seed(5))
    expected = module(x, ids, scores)
    module.config._experts_implementation = "upcycle"
    return module(x, ids, scores), expected


def test_experts_without_a_gate() -> None:
    """Nemotron-H: one projection up, relu squared."""
    nemotron = {
        "n_routed_experts": 4,
        "hybrid_override_pattern": "E*",
        "num_hidden_layers": 2,
        "n_groups": 1,
        "mamba_num_heads": 4,
    }
    module = experts_of("nemotron_h", moe_shared_expert_intermediate_size=16, mamba_head_dim=16, **nemotron)
    assert not module.has_gate
    found, expected = both(module, random_ids(40, 2, 4), torch.rand(40, 2))
    assert apart(found, expected) < 1e-5


def test_a_gating_of_its_own_runs_its_own_code_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    forget()
    module = experts_of("gpt_oss", num_local_experts=4, layer_types=["full_attention"] * 2)
    found, expected = both(module, random_ids(40, 2, 4), torch.rand(40, 2))
    assert torch.equal(found, expected)
    module(torch.randn(3, 32), random_ids(3, 2, 4), torch.rand(3, 2))
    (record,) = [record for record in caplog.records if record.name == "upcycle.kernels"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("GptOssExperts has a gating of its own")


def test_flags_and_biases() -> None:
    """What ``use_experts_implementation`` can say of a class, against transformers' own ``batched_mm``."""
    from transformers.integrations.moe import batched_mm_experts_forward

    for transposed in (False, True):
        for gated in (False, True):
            module = bare(transposed, gated)
            x, ids, scores = torch.randn(80, 12), random_ids(80, 2, 5), torch.rand(80, 2)
            expected = batched_mm_experts_forward(module, x, ids, scores)
            assert apart(transformers_experts.stock_experts(module, x, ids, scores).detach(), expected.detach()) < 1e-5


def bare(transposed: bool, gated: bool, activation: str = "gelu_pytorch_tanh") -> Any:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import _default_apply_gate

    class Bare(torch.nn.Module):
        _apply_gate = _default_apply_gate

        def forward(self, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return x + 1

    module: Any = Bare()
    rows = 16 if gated else 8
    name = "gate_up_proj" if gated else "up_proj"
    up, down = torch.randn(5, rows, 12) / 4, torch.randn(5, 12, 8) / 4
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    for key, value in (
        (name, up),
        (f"{name}_bias", torch.randn(5, rows)),
        ("down_proj", down),
        ("down_proj_bias", torch.randn(5, 12)),
    ):
        setattr(module, key, torch.nn.Parameter(value))
    module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated = gated, True, transposed, True
    module.has_post_expert_norm, module._is_expert_parallel, module.num_experts = False, False, 5
    module.act_fn = ACT2FN[activation]
    return module


def test_interleaved() -> None:
    module = bare(False, True)
    x, ids, scores = torch.randn(80, 12), random_ids(80, 2, 5), torch.rand(80, 2)
    expected = transformers_experts.stock_experts(module, x, ids, scores)
    for key in ("gate_up_proj", "gate_up_proj_bias"):
        whole = getattr(module, key).data
        setattr(module, key, torch.nn.Parameter(torch.stack(whole.chunk(2, 1), 2).flatten(1, 2)))
    module.is_concatenated = False
    assert apart(transformers_experts.stock_experts(module, x, ids, scores).detach(), expected.detach()) < 1e-6


@pytest.mark.parametrize(
    ("activation", "norm", "reason"),
    [("mish", False, "the activation Mish"), ("silu", True, "a norm after every expert")],
)
def test_what_has_no_kernel(activation: str, norm: bool, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    forget()
    module = bare(False, True, activation)
    module.has_post_expert_norm = norm
    x = torch.randn(3, 12)
    assert torch.equal(transformers_experts.stock_experts(module, x, random_ids(3, 2, 5), torch.rand(3, 2)), x + 1)
    assert reason in caplog.text


def test_weights_of_a_class_of_their_own_are_left_to_the_modules_own_code(caplog: pytest.LogCaptureFixture) -> None:
    class Elsewhere(torch.Tensor):
        """Its numbers need not lie where its address says, as those of quantised or divided weights."""

    forget()
    module = bare(False, True)
    module.down_proj = torch.nn.Parameter(module.down_proj.data.as_subclass(Elsewhere))
    x = torch.randn(3, 12)
    assert torch.equal(transformers_experts.stock_experts(module, x, random_ids(3, 2, 5), torch.rand(3, 2)), x + 1)
    assert "weights of the class Elsewhere" in caplog.text


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tokens", [3, 80])
def test_no_weight_is_kept_alive(tokens: int) -> None:
    """Offloading gives a module weights for one call and takes them back; adapters compute them anew for every call."""
    module = bare(False, True)
    first = transformers_experts.stock_experts(
        module, torch.ones(tokens, 12), random_ids(tokens, 2, 5), torch.ones(tokens, 2)
    )
    copies = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    kept = [weakref.ref(parameter.untyped_storage()) for parameter in module.parameters()]
    first = first.detach()
    for name, copy in copies.items():
        setattr(module, name, torch.nn.Parameter(copy))
    gc.collect()
    assert [storage() for storage in kept] == [None] * len(kept)
    again = transformers_experts.stock_experts(
        module, torch.ones(tokens, 12), random_ids(tokens, 2, 5), torch.ones(tokens, 2)
    )
    assert torch.equal(first, again.detach())


def test_another_ranks_experts() -> None:
    """Ids of E or more, with NaN weights: nothing of them is read."""
    module = bare(False, True)
    x, ids, scores = torch.randn(80, 12), random_ids(80, 3, 8), torch.rand(80, 3)
    scores[ids >= 5] = torch.nan
    found = transformers_experts.stock_experts(module, x, ids, scores)
    kept = torch.where(ids < 5, scores, torch.zeros(()))
    expected = transformers_experts.stock_experts(module, x, ids.clamp(max=4), kept)
    assert apart(found.detach(), expected.detach()) < 1e-6
    assert found.isfinite().all()


def test_a_module_that_is_cast_in_place_is_looked_at_again() -> None:
    module = bare(False, True)
    ids, scores = random_ids(80, 2, 5), torch.rand(80, 2)
    x = torch.randn(80, 12)
    single = transformers_experts.stock_experts(module, x, ids, scores)
    module.double()
    double = transformers_experts.stock_experts(module, x.double(), ids, scores)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert apart(single.detach(), double.detach()) < 1e-5
    mixed = transformers_experts.stock_experts(module, x, ids, scores)
    assert mixed.dtype == torch.float32, "states of another dtype than the weights come back as they were"
