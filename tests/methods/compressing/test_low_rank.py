"""Factors of experts, restated in fp64 by whitening and a plain decomposition; and the module that computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_sources import layer_source, random_matrices, random_observations
from safetensors.torch import load_file

import upcycle
from upcycle.errors import UsageError
from upcycle.methods.compressing.described_cuts import cut_of, described_cut
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.low_rank import LowRank, LowRankParameters
from upcycle.models.own.factored_experts import FactoredExperts, ranked_rows
from upcycle.models.own.replaced_ffn import ReplacedFfn, read_replaced
from upcycle.models.own.routing.top_k import TopKRule

Models = Callable[..., Path]
E, F, D = 4, 5, 7
TEXT: dict[str, Any] = {"text": "demo", "tokens": 4096, "window": 32}


def source(scale: tuple[float, ...] = (1.0,) * E) -> LayerSource:
    """A layer whose experts read and compute correlated numbers, some of them more."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(E, 40, D, generator=draw) @ torch.randn(E, D, D, generator=draw)
    h = torch.randn(E, 40, F, generator=draw) @ torch.randn(E, F, F, generator=draw)
    factor = torch.tensor(scale)[:, None, None]
    seen = replace(random_observations(E), input_gram=factor * (x.mT @ x), neuron_gram=factor * (h.mT @ h))
    return layer_source(seen, random_matrices(F, D))


def whitened(weight: torch.Tensor, gram: torch.Tensor, rank: int, ridge: float) -> torch.Tensor:
    """``A B`` by the papers' way: W times a Cholesky factor, truncated, times the factor's inverse."""
    gram = gram.double() + ridge * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    lower = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight.double() @ lower)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(lower)


@pytest.mark.parametrize("ranks", ["equal", "importance"])
def test_factors_are_the_truncated_decomposition_in_the_metric(ranks: Any) -> None:
    given = source((1.0, 5.0, 0.2, 1.0))
    cut, factors = LowRank(LowRankParameters(ranks=ranks)).decomposed(given, 800)
    pieces = {part: rows.split([pair[part.startswith("down")] for pair in cut.ranks]) for part, rows in factors.items()}
    for expert, (up, down) in enumerate(cut.ranks):
        own = given.matrices(expert)
        made = pieces["up_out"][expert].T @ pieces["up_in"][expert]
        expected = whitened(torch.cat([own["gate"], own["up"]]), given.seen.input_gram[expert], up, 1e-3)
        torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-4)  # factors are fp32
        made = pieces["down_out"][expert].T @ pieces["down_in"][expert]
        expected = whitened(own["down"], given.seen.neuron_gram[expert], down, 1e-3)
        torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-4)


def test_ranks_go_where_the_outputs_are() -> None:
    equal = LowRank(LowRankParameters(ranks="equal")).decomposed(source(), 800)[0].ranks
    cut = LowRank(LowRankParameters()).decomposed(source((1.0, 100.0, 1e-4, 1.0)), 800)[0]
    # 0.8 of 2 F d / (2 F + d) = 4.1 and of F d / (F + d) = 2.9.
    assert equal == ((3, 2),) * E
    own = [up for up, _ in cut.ranks]
    assert sum(own) == 12
    assert own[1] == max(own) == 4 > own[2] == min(own) == 1
    assert [down for _, down in cut.ranks] == [2] * E  # of 3, the factors would be larger than the matrix
    assert cut_of(json.loads(json.dumps(described_cut(cut)))) == cut


def test_ranks_are_the_largest_squares_of_all_experts() -> None:
    """Greedy over single directions, in plain Python."""
    given, method = source((1.0, 3.0, 0.3, 1.0)), LowRank(LowRankParameters())
    spectra = [method._decomposed(given, expert)[1][0].tolist() for expert in range(E)]
    ranks, total = [1] * E, 12
    while sum(ranks) < total:
        free = [e for e in range(E) if ranks[e] < 4]
        ranks[max(free, key=lambda e: spectra[e][ranks[e]])] += 1
    assert [pair[0] for pair in method.decomposed(given, 800)[0].ranks] == ranks


def test_without_observed_products_weights_are_decomposed_by_what_is_known() -> None:
    given = source()
    seen = replace(given.seen, input_gram=torch.zeros(0), neuron_gram=torch.zeros(0))
    cut, factors = LowRank(LowRankParameters(ranks="equal")).decomposed(replace(given, seen=seen), 800)
    own = given.matrices(0)
    expected = whitened(torch.cat([own["gate"], own["up"]]), torch.eye(D), 3, 0)
    made = factors["up_out"][:3].T @ factors["up_in"][:3]
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-4)
    down = factors["down_out"][:2].T @ factors["down_in"][:2]
    torch.testing.assert_close(
        down.double(), whitened(own["down"], seen.neurons[0].diag(), 2, 1e-3), rtol=1e-4, atol=1e-4
    )
    assert cut.rows == (0, 1, 2, 3)


RANKS = ((3, 2), (1, 4), (2, 2))


def factored(gated: bool = True) -> FactoredExperts:
    ffn = ReplacedFfn((("mlp",),), D, "silu", gated, frozenset(), (F,) * 3, 0, False, TopKRule(2), ranks=RANKS)
    made = FactoredExperts(ffn).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.float64))
    return made


@pytest.mark.parametrize("gated", [True, False])
def test_the_module_computes_products(gated: bool) -> None:
    made, draw = factored(gated), torch.Generator().manual_seed(1)
    x = torch.randn(6, D, generator=draw, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [2, 0], [3, 1], [1, 2], [2, 3], [3, 3]])  # 3 is no expert
    weights = torch.rand(6, 2, generator=draw, dtype=torch.float64)
    expected = torch.zeros(6, D, dtype=torch.float64)
    for t, k in ((t, k) for t in range(6) for k in range(2) if ids[t, k] < 3):
        e = int(ids[t, k])
        up, down = (slice(sum(r[i] for r in RANKS[:e]), sum(r[i] for r in RANKS[: e + 1])) for i in (0, 1))
        z = (made.up_out[up].T @ made.up_in[up]) @ x[t]
        h = torch.nn.functional.silu(z[:F]) * z[F:] if gated else torch.nn.functional.silu(z)
        expected[t] += weights[t, k] * (made.down_out[down].T @ made.down_in[down]) @ h
    with torch.no_grad():
        torch.testing.assert_close(made(x, ids, weights), expected, rtol=1e-10, atol=1e-10)
        padded = made.down_projections()
        assert padded.shape == (3, D, 4)
        own = torch.stack([made.active(x, e) @ padded[e].T for e in range(3)], 1)
        full = made(x, torch.arange(3).expand(6, 3), torch.ones(6, 3, dtype=torch.float64))
        torch.testing.assert_close(own.sum(1), full, rtol=1e-10, atol=1e-10)
        before = made.down_out.clone()
        made.set_down_projections(padded)
        assert torch.equal(made.down_out, before)
        assert torch.equal(ranked_rows(padded, [2, 4, 2]), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [[1, 2]]}, "has 1 pairs, and there are 2 experts"),
        ({"ranks": [[1, 2], [0, 1]]}, "must be a list of pairs of positive integers"),
        ({"biases": ["up"]}, "is for experts of one width without biases"),
    ],
)
def test_wrong_ranks_in_a_configuration_are_named(change: dict[str, Any], message: str) -> None:
    from upcycle.errors import CheckpointError

    ffn = ReplacedFfn((("mlp",),), D, "silu", True, frozenset(), (F, F), 0, False, TopKRule(2), ranks=((1, 2), (2, 1)))
    assert read_replaced([json.loads(json.dumps(ffn.to_json()))], "config.json") == [ffn]
    with pytest.raises(CheckpointError, match=message):
        read_replaced([{**ffn.to_json(), **change}], "config.json")


@pytest.mark.long
@pytest.mark.parametrize("fused", [False, True])
def test_a_stock_class_stores_the_products_and_says_that_it_saves_nothing(
    fused: bool, pico_moe: Models, tmp_path: Path
) -> None:
    keys = {"method": "low_rank", "keep": 0.6, "refit": "none", "calibration": TEXT, "verification": {"tokens": 64}}
    stock = upcycle.convert(str(pico_moe("qwen3_moe", fused)), tmp_path / "stock", **keys)
    thin = upcycle.convert(str(pico_moe("qwen3_moe", fused)), tmp_path / "thin", target="upcycle_moe", **keys)
    assert any("this saves nothing" in warning for warning in stock.plan.warnings)
    assert not any("this saves nothing" in warning for warning in thin.plan.warnings)
    assert stock.plan.parameters_total == stock.plan.parameters_dense > thin.plan.parameters_total
    assert stock.plan.flops_per_token == stock.plan.flops_per_token_dense > thin.plan.flops_per_token
    one, two = (found.verification for found in (stock, thin))
    assert one is not None
    assert two is not None
    # The same function but for the roundings of products in fp32.
    assert one.relative_logit_error == pytest.approx(two.relative_logit_error, rel=1e-4)
    assert {name: t.shape for name, t in load_file(pico_moe("qwen3_moe", fused) / "model.safetensors").items()} == {
        name: t.shape for name, t in load_file(tmp_path / "stock" / "model.safetensors").items()
    }


@pytest.mark.long
def test_the_last_factor_is_refitted(pico_moe: Models, tmp_path: Path) -> None:
    keys = {
        "method": "low_rank",
        "keep": 0.6,
        "target": "upcycle_moe",
        "calibration": TEXT,
        "verification": {"tokens": 64},
    }
    upcycle.convert(str(pico_moe("qwen3_moe")), tmp_path / "out", **keys)
    first = json.loads((tmp_path / "out" / "compression.json").read_text())["refit"]["0"]
    assert first["missing_after"] < first["missing_before"]


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({}, "low_rank needs to know which part", "--keep 0.5"),
        ({"keep": 0.01}, "keep 0.01 of experts of 16 neurons and hidden size 32 leaves rank 0", "or more"),
        ({"keep": 0.5}, "a refit would fill matrices of low rank again", "--target upcycle_moe, or --refit none"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, float], message: str, hint: str, pico_moe: Models) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        upcycle.plan(str(pico_moe("qwen3_moe")), method="low_rank", calibration={"text": "demo"}, **keys)
    assert hint in (caught.value.hint or "")
