"""What every routing rule promises, and each paper's formula in fp64, written anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.models.own.routing.base import RoutedTokens, RouterRule
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule
from upcycle.models.own.routing.causal_choice import CausalChoiceRule
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.models.own.routing.expert_choice import ExpertChoiceRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.rules import RULES
from upcycle.models.own.routing.skip import SkipRule
from upcycle.models.own.routing.standardized import StandardizedTopKRule
from upcycle.models.own.routing.tempered import TemperedRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.models.own.routing.top_k import TopKRule

T, E = 11, 6
EVERY: list[RouterRule] = [
    TopKRule(2),
    TopKRule(3, normalized=False),
    TopKRule(2, scores="sigmoid"),
    TopKRule(1, scores="sigmoid", normalized=False),
    TopKRule(2, scores="ones"),
    TopKRule(2, scores="ones", normalized=False),
    TopKRule(E, scores="ones", normalized=False),
    TopKRule(E),
    TemperedRule(),
    TemperedRule(2, temperature=0.7),
    TemperedRule(2, normalized=True, temperature=2.0),
    TemperedRule(E, temperature=1.5),
    DynamicKRule(0.4),
    DynamicKRule(1),
    DynamicKRule(0),
    ThresholdRule(0.7),
    ReluRule(),
    ExpertChoiceRule(1.2),
    ExpertChoiceRule(1.3, normalized=False),
    ExpertChoiceRule(0.5),
    ExpertChoiceRule(E),
    ExpertChoiceRule(E, normalized=False),
    CausalChoiceRule(1.2),
    CausalChoiceRule(threshold=0.3),
    CausalChoiceRule(threshold=0.6),
    CausalChoiceRule(threshold=0),
    BiasedTopKRule(2),
    BiasedTopKRule(2, "sigmoid", factor=1.5, epsilon=1e-3),
    BiasedTopKRule(3, "sigmoid", False, factor=2.0),
    SkipRule(3),
    SkipRule(3, beta=0.5),
    SkipRule(3, beta=0.5, rescaled=False),
    SkipRule(3, "sigmoid", False, beta=0.8, factor=2.0),
    SkipRule(2, "sigmoid", epsilon=1e-3, beta=0.7),
    StandardizedTopKRule(2),
    StandardizedTopKRule(3, normalized=False, spread=2.5),
    StandardizedTopKRule(2, "sigmoid", spread=0.5),
]


def logits() -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def dense(routed: RoutedTokens) -> torch.Tensor:
    """``[T, E]``: the weight of every expert, 0 where it does not run."""
    every = torch.zeros(len(routed.experts), E + 1, dtype=routed.weights.dtype)
    return every.scatter_add(1, routed.experts, routed.weights)[:, :E]


def active(routed: RoutedTokens) -> torch.Tensor:
    """bool ``[T, E]``."""
    every = torch.zeros(len(routed.experts), E + 1, dtype=torch.bool)
    return every.scatter(1, routed.experts, True)[:, :E]


def biased_top_k(
    rule: BiasedTopKRule, soft: list[float], z: list[float], bias: list[float] | None = None
) -> list[float]:
    """One token's weights by the K largest of the scores and a bias, those much smaller than the first left out."""
    import math

    scores = soft if rule.scores == "softmax" else [1 / (1 + math.exp(-one)) for one in z]
    chosen = sorted(range(len(z)), key=lambda e: -(scores[e] + (bias or [0.0] * len(z))[e]))[: rule.top_k]
    beta = rule.beta if isinstance(rule, SkipRule) else 0.0
    left = [e for e in chosen if scores[e] >= beta * max(scores[c] for c in chosen)]
    whole = sum(scores[e] for e in chosen)
    rest = whole if isinstance(rule, SkipRule) and not rule.rescaled else sum(scores[e] for e in left)
    total = (whole + rule.epsilon) * rest / whole if rule.normalized else 1.0
    return [rule.factor * scores[e] / total if e in left else 0.0 for e in range(len(z))]


def causal_choice(rule: CausalChoiceRule, soft: list[float], correction: list[float]) -> list[float]:
    """One token's weights: shares of the softmax among experts that are probable enough to choose it."""
    import math

    odds = [len(soft) * p * math.exp(c) for p, c in zip(soft, correction, strict=True)]
    left = [e for e, o in enumerate(odds) if o / (1 + o) >= rule.threshold]
    return [p / sum(soft[c] for c in left) if e in left else 0.0 for e, p in enumerate(soft)]


def restated(rule: RouterRule, z: list[float]) -> list[float]:
    """One token's weights by the rule's formula, in plain Python; 0 of an expert that does not run."""
    import math

    if isinstance(rule, StandardizedTopKRule):
        mean = sum(z) / len(z)
        std = math.sqrt(sum((one - mean) ** 2 for one in z) / len(z))
        z = [rule.spread * (one - mean) / (std + 1e-6) for one in z]
        rule = TopKRule(rule.top_k, rule.scores, rule.normalized)

    top = max(z)
    soft = [math.exp(one - top) for one in z]
    soft = [one / sum(soft) for one in soft]
    match rule:
        case BiasedTopKRule() | CausalChoiceRule():
            biased = isinstance(rule, BiasedTopKRule)
            return biased_top_k(rule, soft, z) if biased else causal_choice(rule, soft, [0.0] * len(z))
        case TemperedRule():
            warm = [math.exp((one - top) / rule.temperature) for one in z]
            chosen = sorted(range(len(z)), key=lambda e: -z[e])[: rule.top_k]
            total = sum(warm[e] for e in chosen) if rule.normalized else sum(warm)
            return [warm[e] / total if e in chosen else 0.0 for e in range(len(z))]
        case TopKRule():
            scores = soft if rule.scores == "softmax" else [1 / (1 + math.exp(-one)) for one in z]
            scores = [1.0] * len(z) if rule.scores == "ones" else scores
            chosen = sorted(range(len(z)), key=lambda e: -z[e])[: rule.top_k]
            total = sum(scores[e] for e in chosen) if rule.normalized else 1.0
            return [scores[e] / total if e in chosen else 0.0 for e in range(len(z))]
        case DynamicKRule():
            return [float(abs(one) >= rule.tau * max(map(abs, z))) for one in z]
        case ThresholdRule():
            return [len(z) * one if len(z) * one > rule.threshold else 0.0 for one in soft]
        case ReluRule():
            return [max(one, 0.0) for one in z]
    raise AssertionError(rule)


EACH = [rule for rule in EVERY if rule.per_token]


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in EVERY} == set(RULES)
    assert all(rule.title and rule.paper.startswith("https://") for rule in RULES.values())


@pytest.mark.parametrize("rule", EACH, ids=str)
def test_weights_are_those_of_the_formula(rule: RouterRule) -> None:
    z = logits()
    expected = torch.tensor([restated(rule, row) for row in z.tolist()], dtype=torch.float64)
    assert torch.allclose(dense(rule.route(z)), expected, rtol=1e-12, atol=0)
    assert torch.equal(active(rule.route(z)), expected > 0)
    assert rule.route(z).experts.shape[1] == rule.most_experts(E)


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_the_order_of_tokens_and_of_experts_does_not_matter(rule: RouterRule) -> None:
    z, generator = logits(), torch.Generator().manual_seed(1)
    tokens, experts = torch.randperm(T, generator=generator), torch.randperm(E, generator=generator)
    assert torch.equal(dense(rule.route(z[tokens])), dense(rule.route(z))[tokens])
    assert torch.allclose(dense(rule.route(z[:, experts])), dense(rule.route(z))[:, experts], rtol=1e-12)


@pytest.mark.parametrize("rule", EACH, ids=str)
def test_a_token_depends_on_no_other_where_that_is_claimed(rule: RouterRule) -> None:
    z = logits()
    other = z.clone()
    other[5:] = torch.randn(T - 5, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 9
    assert torch.equal(dense(rule.route(z))[:5], dense(rule.route(other))[:5])
    assert rule.all_alike(E, equal_logits=False) or not torch.equal(
        dense(rule.route(z))[5:], dense(rule.route(other))[5:]
    )


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_sums_are_one_where_that_is_claimed(rule: RouterRule) -> None:
    sums = dense(rule.route(logits())).sum(1)
    always_one = rule != DynamicKRule(1) and torch.allclose(
        sums, torch.ones_like(sums), rtol=1e-12
    )  # that one unless there are ties
    # With few tokens, all may be chosen by an expert, which nothing promises.
    by_chance = isinstance(rule, ExpertChoiceRule | CausalChoiceRule) and always_one
    assert always_one == rule.sums_to_one(E) or by_chance


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_gradients_are_finite_differences(rule: RouterRule) -> None:
    z = logits().requires_grad_()

    def weights(values: torch.Tensor) -> torch.Tensor:
        return dense(rule.route(values))

    if isinstance(rule, DynamicKRule) or getattr(rule, "scores", None) == "ones":
        assert not weights(z).requires_grad
    else:
        assert torch.autograd.gradcheck(weights, (z,))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("top_k", {"top_k": 0}, "'top_k' must be a positive integer, got 0"),
        ("top_k", {"top_k": True}, "'top_k' must be a positive integer"),
        ("top_k", {"scores": "soft"}, "'scores' must be softmax, sigmoid or ones, got 'soft'"),
        ("top_k", {"normalized": 1}, "'normalized' must be true or false"),
        ("top_k", {"tau": 1}, "'tau' is no parameter of the rule top_k: it has top_k, scores, normalized"),
        ("tempered", {"temperature": 0}, "'temperature' must be a positive number, got 0"),
        ("tempered", {"scores": "sigmoid"}, "'scores' must be softmax, got 'sigmoid'"),
        ("dynamic_k", {"tau": 1.5}, "'tau' must be a number from 0 to 1, got 1.5"),
        ("threshold", {"threshold": float("nan")}, "'threshold' must be a number that is not negative"),
        ("relu", {"threshold": 1}, "'threshold' is no parameter of the rule relu"),
        ("expert_choice", {"capacity_factor": 0}, "'capacity_factor' must be a positive number, got 0"),
        ("expert_choice", {"capacity_factor": True}, "'capacity_factor' must be a positive number"),
        ("expert_choice", {"group": "image"}, "'group' must be sequence or batch, got 'image'"),
        ("expert_choice", {"normalized": 1}, "'normalized' must be true or false"),
        ("causal_choice", {"capacity_factor": -1}, "'capacity_factor' must be a positive number, got -1"),
        ("causal_choice", {"threshold": 1}, "'threshold' must be a number from 0 to below 1, got 1"),
        ("causal_choice", {"group": "batch"}, "'group' is no parameter of the rule causal_choice"),
        ("biased_top_k", {"scores": "ones"}, "'scores' must be softmax or sigmoid, got 'ones'"),
        ("biased_top_k", {"factor": 0}, "'factor' must be a positive number, got 0"),
        ("biased_top_k", {"epsilon": -1}, "'epsilon' must be a not negative number, got -1"),
        ("biased_top_k", {"biased": 1}, "'biased' must be true or false, got 1"),
        ("standardized_top_k", {"spread": 0}, "'spread' must be a positive number, got 0"),
        ("standardized_top_k", {"scores": "ones"}, "'scores' are ones"),
        ("skip", {"beta": 1.5}, "'beta' must be a number from 0 to 1, got 1.5"),
    ],
)
def test_impossible_parameters_are_named(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RULES[name].of(parameters)


@pytest.mark.parametrize("rule", [rule for rule in EVERY if isinstance(rule, BiasedTopKRule)], ids=str)
def test_a_bias_moves_the_choice_alone(rule: BiasedTopKRule) -> None:
    z, bias = logits(), torch.tensor([0.9, -0.4, 0.0, 0.5, -0.8, 0.2], dtype=torch.float64)
    rows = [biased_top_k(rule, row.softmax(0).tolist(), row.tolist(), bias.tolist()) for row in z]
    found = dense(rule.route(z, bias))
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=0)
    assert not torch.equal(found > 0, dense(rule.route(z)) > 0)


@pytest.mark.parametrize("rule", [rule for rule in EVERY if isinstance(rule, CausalChoiceRule)], ids=str)
def test_a_correction_moves_who_runs_and_not_how_those_weigh_against_each_other(rule: CausalChoiceRule) -> None:
    z, correction = logits(), 2 * logits().roll(1, 0)
    rows = [causal_choice(rule, *pair) for pair in zip(z.softmax(1).tolist(), correction.tolist(), strict=True)]
    found = dense(rule.route(z, correction))
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.equal(found > 0, dense(rule.route(z)) > 0) == (rule.threshold == 0)
    assert rule.mean_experts(E) == (E if rule.threshold == 0 else rule.capacity_factor)


def test_leaving_none_out_is_top_k_bit_for_bit() -> None:
    for normalized in (True, False):
        for one, two in zip(
            SkipRule(3, normalized=normalized).route(logits()),
            TopKRule(3, normalized=normalized).route(logits()),
            strict=True,
        ):
            assert torch.equal(one, two)


@pytest.mark.parametrize("rule", EVERY, ids=str)
def test_what_a_rule_says_of_equal_logits_is_what_it_does(rule: RouterRule) -> None:
    """By this a split adds up to the dense FFN, or is refused."""
    z, weight = torch.full((3, E), rule.router_bias or 0.0, dtype=torch.float64), rule.equal_weight(E)
    gates = rule.gates(z)
    assert torch.allclose(gates[gates > 0], torch.full_like(gates[gates > 0], weight), rtol=1e-12)
    assert rule.all_alike(E, equal_logits=True) == bool((gates > 0).all())
    spread = rule.gates(logits() * 3)
    same = torch.allclose(spread, torch.full_like(spread, weight), rtol=1e-12)
    assert rule.all_alike(E, equal_logits=False) == same
    assert torch.equal(rule.gates(logits()), dense(rule.route(logits())))


def test_a_high_threshold_keeps_nobody_at_equal_logits() -> None:
    assert not ThresholdRule(1.0).all_alike(E, equal_logits=True)
    assert not ThresholdRule(1.0).gates(torch.zeros(2, E)).any()


def test_more_experts_than_there_are_is_a_problem() -> None:
    assert TopKRule(7).check(E) == "'top_k' is 7, and there are 6 experts"
    assert TopKRule(6).check(E) is None
    assert ExpertChoiceRule(6.5).check(E) == "'capacity_factor' is 6.5, and only 6 experts can take a token"
    assert ExpertChoiceRule(6).check(E) is None
    assert CausalChoiceRule(6.5).check(E) == "'capacity_factor' is 6.5, and only 6 experts can take a token"
