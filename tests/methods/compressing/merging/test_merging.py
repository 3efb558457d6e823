"""HC-SMoE and M-SMoE against their papers in plain loops: groups, alignment, and merged weights, in fp64."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_sources import layer_source, random_matrices, random_observations
from moe_oracle import block_of, layers_of, stock

import upcycle
from upcycle.architectures.expert_terms import LayerCut, Term
from upcycle.checkpoints.moe_checkpoint import reordered
from upcycle.methods.compressing.merging.hc_smoe import HcSmoe
from upcycle.methods.compressing.merging.m_smoe import MSmoe
from upcycle.methods.compressing.merging.merge_groups import aligned, merged
from upcycle.plugins import PluginParameters

Models = Callable[..., Path]


def groups_of(cut: LayerCut) -> set[frozenset[int]]:
    return {frozenset(term.expert for term in terms) for terms in cut.experts}


def clusters(points: np.ndarray, count: int) -> set[frozenset[int]]:
    """Average linkage, pair by pair: the mean distance of all pairs of members."""
    found = [[i] for i in range(len(points))]
    while len(found) > count:
        one, other = min(
            itertools.combinations(range(len(found)), 2),
            key=lambda pair: np.mean(
                [np.linalg.norm(points[a] - points[b]) for a in found[pair[0]] for b in found[pair[1]]]
            ),
        )
        found[one] += found.pop(other)
    return {frozenset(group) for group in found}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [2, 3, 6])
def test_hc_smoe_joins_the_closest_mean_outputs(seed: int, keep: int) -> None:
    seen = random_observations(7, seed)
    cut = HcSmoe(PluginParameters()).cut(layer_source(seen), keep)
    assert groups_of(cut) == clusters(seen.mean_output.numpy(), keep)
    check_shares(cut, seen.load)


def check_shares(cut: LayerCut, load: torch.Tensor) -> None:
    """Weights are shares of use, and the row is that of the member of most use."""
    assert list(cut.rows) == sorted(cut.rows)
    for terms, row in zip(cut.experts, cut.rows, strict=True):
        total = sum(float(load[term.expert]) for term in terms)
        for term in terms:
            assert term.weight == pytest.approx(float(load[term.expert]) / total, rel=1e-12)
        assert float(load[row]) == max(float(load[term.expert]) for term in terms)
        assert row in {term.expert for term in terms}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [2, 4])
def test_m_smoe_joins_the_dominant_expert_of_the_most_similar_logits(seed: int, keep: int) -> None:
    seen = random_observations(7, seed)
    cut = MSmoe(PluginParameters()).cut(layer_source(seen), keep)
    stay = sorted(range(7), key=lambda e: (-float(seen.load[e]), e))[:keep]
    logits, groups = seen.sample_logits, {expert: {expert} for expert in stay}
    for expert in set(range(7)) - set(stay):
        like = {e: float(torch.cosine_similarity(logits[:, expert], logits[:, e], dim=0)) for e in stay}
        groups[max(like, key=lambda e: like[e])].add(expert)
    assert groups_of(cut) == {frozenset(group) for group in groups.values()}
    assert set(cut.rows) == set(stay)
    check_shares(cut, seen.load)


def likeness(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], order: Any) -> float:
    return sum(
        float(
            one["gate"][i] @ other["gate"][j] + one["up"][i] @ other["up"][j] + one["down"][:, i] @ other["down"][:, j]
        )
        for i, j in enumerate(order)
    )


@pytest.mark.parametrize("seed", range(3))
def test_alignment_is_the_best_of_all_orders(seed: int) -> None:
    matrices = random_matrices(5, 7, seed)
    found = aligned(layer_source(random_observations(3), matrices), 0, [1, 2])
    for expert in (1, 2):
        best = max(itertools.permutations(range(5)), key=lambda order: likeness(matrices(0), matrices(expert), order))
        assert found[expert] == best


def test_permuted_copies_of_one_expert_merge_to_itself() -> None:
    whole = random_matrices(6, 9)(0)
    orders = [torch.arange(6), torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([5, 4, 3, 2, 1, 0])]

    def matrices(expert: int) -> dict[str, torch.Tensor]:
        return {part: reordered(matrix, part, orders[expert]) for part, matrix in whole.items()}

    seen = random_observations(3)
    cut = MSmoe(PluginParameters()).cut(layer_source(seen, matrices), 1)
    (terms,), (first,) = cut.experts, cut.rows
    assert len(terms) == 3
    for part in whole:
        made = torch.zeros_like(whole[part])
        for term in terms:
            matrix = matrices(term.expert)[part]
            made += term.weight * (matrix if term.order is None else reordered(matrix, part, torch.tensor(term.order)))
        assert torch.allclose(made, matrices(first)[part], rtol=1e-5, atol=1e-6)


def test_fused_matrices_are_reordered_in_both_halves() -> None:
    gate, up, order = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([2, 0, 3, 1])
    assert torch.equal(reordered(torch.cat([gate, up]), "gate_up", order), torch.cat([gate[order], up[order]]))
    assert torch.equal(reordered(gate.T, "down", order), gate.T[:, order])


def test_experts_that_no_token_chose_weigh_nothing_beside_others() -> None:
    load = torch.tensor([0.0, 4.0, 0.0, 0.0]).double()
    cut = merged([[0, 1], [2, 3]], load)
    assert cut.experts == ((Term(1),), (Term(2, 0.5), Term(3, 0.5)))
    assert cut.rows == (1, 2)


def test_a_group_that_no_token_chose_is_aligned_before_it_is_averaged() -> None:
    seen = replace(random_observations(4), load=torch.tensor([5.0, 0.0, 0.0, 0.0]).double())
    alike = seen.logits_gram.clone()
    alike[1, 2] = alike[2, 1] = alike[1, 3] = alike[3, 1] = 1e6  # both join the second
    cut = MSmoe(PluginParameters()).cut(layer_source(replace(seen, logits_gram=alike)), 2)
    assert cut.rows == (0, 1)
    first, *others = cut.experts[1]
    assert first.order is None
    assert all(term.order is not None for term in others)
    assert len(others) == 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["hc_smoe", "m_smoe"])
def test_written_experts_are_the_weighted_sums(method: str, fused: bool, pico_moe: Models, tmp_path: Path) -> None:
    """Every matrix of the stock model that loads the result, from the source's matrices in fp64 and ``compression.json``."""
    keys: dict[str, Any] = {"keep": 0.5, "refit": "none", "calibration": {"text": "demo", "tokens": 256, "window": 64}}
    source, out = pico_moe("dots1", fused), tmp_path / "out"
    upcycle.convert(str(source), out, method=method, verification={"tokens": 64}, **keys)
    before, after = (layers_of(stock(folder)) for folder in (source, out))
    content, merges = json.loads((out / "compression.json").read_text())["experts"], 0
    for index in (0, 1):
        one, other, cut = block_of(before[index]), block_of(after[index]), content[str(index)]
        assert torch.equal(other.gate.weight, one.gate.weight[cut["rows"]])
        assert torch.equal(other.gate.e_score_correction_bias, one.gate.e_score_correction_bias[cut["rows"]])
        for place, terms in enumerate(cut["experts"]):
            merges += len(terms) > 1
            for part in ("gate_up_proj", "down_proj"):
                total = torch.zeros_like(getattr(one.experts, part)[0])
                for term in terms:
                    matrix = getattr(one.experts, part)[term["expert"]]
                    order = torch.tensor(term["order"] or range(16))
                    rows = torch.cat([order, order + 16])
                    total = total + term["weight"] * (matrix[:, order] if part == "down_proj" else matrix[rows])
                found = getattr(other.experts, part)[place]
                assert torch.linalg.norm(found - total) <= 2e-7 * torch.linalg.norm(total)
    assert merges
