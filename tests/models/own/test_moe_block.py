"""The block of experts: its ways of computing agree with one another and with the formula."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from upcycle.ffn.router_network import LINEAR, RouterForm
from upcycle.models.own.moe_block import KERNEL_ACTIVATIONS, MoeBlock
from upcycle.models.own.replaced_ffn import Bias, ReplacedFfn
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.causal_choice import CausalChoiceRule
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.models.own.routing.expert_choice import ExpertChoiceRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.skip import SkipRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.models.own.routing.top_k import TopKRule

pytestmark = pytest.mark.one_in(4)  # the other cases are long

D, T = 6, 10
ALL: frozenset[Bias] = frozenset({"gate", "up", "down", "output"})
MLP = RouterForm(7, "tanh", unit_inputs=True)
RULES: list[RouterRule] = [
    TopKRule(2),
    TopKRule(2, "sigmoid", False),
    DynamicKRule(0.5),
    ThresholdRule(0.8),
    ReluRule(),
    ExpertChoiceRule(1.5, "batch"),
    CausalChoiceRule(threshold=0.4),
    SkipRule(2, beta=0.7),
]
WIDTHS = ((4, 4, 4), (3, 1, 5))


def block(
    rule: RouterRule,
    widths: tuple[int, ...] = WIDTHS[0],
    gated: bool = True,
    biases: frozenset[Bias] = ALL,
    activation: str = "silu",
    shared: int = 2,
    router: RouterForm = LINEAR,
) -> MoeBlock:
    """A block in fp64 whose every number is random."""
    biases = biases if gated else biases - {"gate"}
    made = MoeBlock(
        ReplacedFfn((("mlp",),), D, activation, gated, biases, widths, shared, True, rule, router=router)
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return made


def tokens() -> torch.Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def restated(made: MoeBlock, x: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert."""
    experts, act = made.experts, made.experts.act
    out = torch.zeros_like(x)
    read = [
        token if made.router.hidden is None else (made.router.hidden.weight @ (token / token.norm())).tanh()
        for token in x
    ]
    logits = torch.stack([made.router.weight @ one + made.router.bias for one in read])
    if isinstance(made.rule, CausalChoiceRule):
        predictor = made.router.choice
        ids, weights = made.rule.route(logits, torch.stack([predictor.weight @ one + predictor.bias for one in x]))
    else:
        ids, weights = made.rule.route(logits)
    for i, token in enumerate(x):
        for e, weight in zip(ids[i].tolist(), weights[i], strict=True):
            if e == experts.count:
                continue
            first = sum(experts.widths[:e])
            for j in range(first, first + experts.widths[e]):
                rows = experts.gate_up if experts.gated else experts.up
                bias = torch.zeros(len(rows)) if experts.up_bias is None else experts.up_bias
                if experts.gated:
                    neuron = act(rows[2 * j] @ token + bias[2 * j]) * (rows[2 * j + 1] @ token + bias[2 * j + 1])
                else:
                    neuron = act(rows[j] @ token + bias[j])
                out[i] += weight * neuron * experts.down[j]
            if experts.down_bias is not None:
                out[i] += weight * experts.down_bias[e]
        if made.has_shared:
            up = made.shared_up(token)
            out[i] += made.shared_down(act(up) if made.shared_gate is None else act(made.shared_gate(token)) * up)
        if made.output_bias is not None:
            out[i] += made.output_bias
    return out


@pytest.mark.parametrize("router", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_way_of_computing_is_the_formula(
    rule: RouterRule, widths: tuple[int, ...], gated: bool, router: RouterForm
) -> None:
    made, x = block(rule, widths, gated, router=router), tokens()
    with torch.no_grad():
        expected = restated(made, x.reshape(-1, D)).view_as(x)
        for implementation in ("upcycle", "eager"):
            made.experts.implementation = implementation
            assert torch.allclose(made(x), expected, rtol=1e-10, atol=1e-10), implementation
        flat = x.reshape(-1, D)
        _, weights, ids = made.router(flat)
        masked = made._whole(flat, made.experts._masked(flat, ids, weights))
        assert torch.allclose(masked.view_as(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "biases", [frozenset(), frozenset({"up"}), frozenset({"down"}), frozenset({"output"})], ids=str
)
def test_every_bias_may_be_missing(biases: frozenset[Bias]) -> None:
    made, x = block(TopKRule(2), biases=biases, shared=0), tokens()
    assert torch.allclose(made(x), restated(made, x.reshape(-1, D)).view_as(x), rtol=1e-10, atol=1e-10)
    kept = {name.rpartition(".")[2] for name, _ in made.named_parameters()} & {"up_bias", "down_bias", "output_bias"}
    assert kept == {f"{name}_bias" for name in biases}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("router", [LINEAR, MLP], ids=["linear", "mlp"])
@pytest.mark.parametrize("implementation", ["upcycle", "eager"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_are_finite_differences(rule: RouterRule, implementation: str, router: RouterForm) -> None:
    made, x = block(rule, WIDTHS[1], router=router), tokens().reshape(-1, D)[:3].requires_grad_()
    made.experts.implementation = implementation
    names = [name for name, _ in made.named_parameters()]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(run, (x, *made.parameters()))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_order_of_tokens_and_experts_does_not_matter(rule: RouterRule) -> None:
    made, x = block(rule, WIDTHS[1]), tokens().reshape(-1, D)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    expected = made(x)
    assert torch.allclose(made(x[order]), expected[order], rtol=1e-12, atol=1e-12)
    moved = block(rule, WIDTHS[1][::-1])
    with torch.no_grad():
        moved.load_state_dict(made.state_dict())
        predictor = ("router.choice.weight", "router.choice.bias") if made.rule.predicts_choice else ()
        for name in ("router.weight", "router.bias", "experts.down_bias", *predictor):
            moved.get_parameter(name).copy_(made.get_parameter(name).flip(0))
        for name, rows in (("experts.gate_up", 2), ("experts.down", 1), ("experts.up_bias", 2)):
            pieces = made.get_parameter(name).split([rows * width for width in WIDTHS[1]])
            moved.get_parameter(name).copy_(torch.cat(pieces[::-1]))
    assert torch.allclose(moved(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("own", "kernels"), KERNEL_ACTIVATIONS.items())
def test_the_kernels_activation_is_the_same_function(own: str, kernels: str) -> None:
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    assert torch.allclose(ACT2FN[own](x), ACT2FN[kernels](x), rtol=1e-7, atol=1e-9)  # gelu_fast rounds its constant


def test_activations_without_a_kernel_run_on_their_own_code() -> None:
    made, x = block(TopKRule(2), activation="quick_gelu"), tokens()
    assert made.experts.kernel_activation is None
    assert torch.allclose(made(x), restated(made, x.reshape(-1, D)).view_as(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["silu", "quick_gelu"])
@pytest.mark.parametrize("rule", [TopKRule(2), ReluRule()], ids=str)
def test_a_compiler_looks_through_it_whole(rule: RouterRule, activation: str) -> None:
    made, x = block(rule, WIDTHS[1], activation=activation), tokens()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    expected = made(x)
    assert torch.allclose(compiled(x), expected, rtol=1e-10, atol=1e-10)
    (own,) = torch.autograd.grad(expected.square().sum(), made.experts.down)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), made.experts.down)
    assert torch.allclose(found, own, rtol=1e-8, atol=1e-8)


def test_everyone_runs_whatever_the_router_says() -> None:
    made, x = block(TopKRule(1), shared=0, biases=frozenset()), tokens()
    ones = block(ReluRule(), shared=0, biases=frozenset())
    with torch.no_grad():
        ones.load_state_dict(made.state_dict())
        ones.router.weight.zero_()
        ones.router.bias.fill_(0.5)
    assert torch.allclose(made.everyone(x, 0.5), ones(x), rtol=1e-10, atol=1e-10)
    biased = block(TopKRule(1), shared=0, biases=frozenset({"down"}))
    with torch.no_grad():
        biased.load_state_dict(made.state_dict(), strict=False)
        expected = ones(x) + biased.experts.down_bias.mean(0)
    assert torch.allclose(biased.everyone(x, 0.5), expected, rtol=1e-10, atol=1e-10)
