"""Contributions and captured shares against loops over tokens, experts and neurons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear, silu

from upcycle.ffn import router_capture
from upcycle.ffn.activations import Activations, Inputs
from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.router_capture import Capture, ExpertMap, captured

D, F, T = 10, 16, 24
# Experts overlap (neuron 3), have zero neurons, and leave neurons to nobody.
ROUTED = ([0, 1, 2, 3], [3, 4, 5, ZERO_NEURON], [6, 7, ZERO_NEURON, ZERO_NEURON])
SHARED = ([12, 13, 14, 15],)


@pytest.fixture
def layer() -> tuple[FeedForward, LayerBlueprint, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((F, D), (F, D), (D, F)))
    specs = [tuple(ExpertSpec(torch.tensor(e)) for e in experts) for experts in (ROUTED, SHARED)]
    blueprint = LayerBlueprint(0, specs[0], top_k=2, scale=3.0, shared=specs[1])
    return FeedForward(0, gate, up, down, torch.ones(D), "silu"), blueprint, torch.randn(T, D, generator=rng)


def hidden(ffn: FeedForward, x: torch.Tensor) -> torch.Tensor:
    gate, up, x = ffn.gate.double(), ffn.up.double(), x.double()
    return silu(linear(x, gate)) * linear(x, up)


def energies_by_loops(ffn: FeedForward, x: torch.Tensor) -> torch.Tensor:
    h, result = hidden(ffn, x), torch.zeros(len(x), len(ROUTED), dtype=torch.float64)
    for t in range(len(x)):
        for e, neurons in enumerate(ROUTED):
            for j in neurons:
                if j != ZERO_NEURON:
                    result[t, e] += (h[t, j] * ffn.down[:, j].double().norm()) ** 2
    return result


def test_energies_and_norms(
    layer: tuple[FeedForward, LayerBlueprint, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ffn, blueprint, x = layer
    (batch,) = Activations.of(ffn, x).batches()
    # fp32 sums of a handful of positive terms.
    torch.testing.assert_close(
        ExpertMap(blueprint, ffn).energies(batch.hidden).double(), energies_by_loops(ffn, x), rtol=1e-5, atol=0
    )
    h = hidden(ffn, x)
    real = [[j for j in neurons if j != ZERO_NEURON] for neurons in ROUTED]
    outputs = torch.stack([h[:, neurons] @ ffn.down[:, neurons].double().T for neurons in real], dim=1)
    for at_once in (1, router_capture._OUTPUT_BYTES):
        monkeypatch.setattr(router_capture, "_OUTPUT_BYTES", at_once)
        norms = ExpertMap(blueprint, ffn).output_norms(batch.hidden)
        torch.testing.assert_close(norms.double(), outputs.norm(dim=-1), rtol=1e-4, atol=1e-5)
    goal = torch.randn(T, D)
    errors = ExpertMap(blueprint, ffn).errors(batch.hidden, goal)
    expected = (outputs - goal[:, None]).square().mean(-1)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-4, atol=1e-5)


def test_refitted_columns_count_where_there_are_some(layer: tuple[FeedForward, LayerBlueprint, torch.Tensor]) -> None:
    ffn, blueprint, x = layer
    (batch,) = Activations.of(ffn, x).batches()
    down = ffn.down[:, blueprint.neurons.clamp(min=0)]
    same = replace(blueprint, down=down)
    torch.testing.assert_close(
        ExpertMap(same, ffn).energies(batch.hidden), ExpertMap(blueprint, ffn).energies(batch.hidden)
    )
    down = down.clone()
    down[:, 4:8] *= 2  # the first routed expert, after one shared one
    doubled = replace(blueprint, down=down)
    factor = torch.tensor([2.0, 1.0, 1.0])
    plain, other = ExpertMap(blueprint, ffn), ExpertMap(doubled, ffn)
    torch.testing.assert_close(other.energies(batch.hidden), plain.energies(batch.hidden) * factor.square())
    torch.testing.assert_close(other.output_norms(batch.hidden), plain.output_norms(batch.hidden) * factor)


@pytest.mark.parametrize("held_out", [True, False])
def test_captured(layer: tuple[FeedForward, LayerBlueprint, torch.Tensor], held_out: bool) -> None:
    ffn, blueprint, x = layer
    rng = torch.Generator().manual_seed(3)
    rows, weight = torch.randn(3, D, generator=rng), torch.rand(T, generator=rng)

    def inputs():
        for start in range(0, T, 6):
            some = slice(start, start + 6)
            yield Inputs(x[some], weight[some], held_out and start == 12)

    counted = range(12, 18) if held_out else range(T)
    energies = energies_by_loops(ffn, x)
    mine = oracle = total = 0.0
    for t in counted:
        logits = (x[t].double() @ rows.double().T).tolist()
        by_logit = sorted(range(3), key=lambda e: -logits[e])
        w, energy = weight[t].item(), energies[t].tolist()
        mine += w * sum(energy[e] for e in by_logit[:2])
        oracle += w * sum(sorted(energy)[1:])
        total += w * sum(energy)
    found = captured(Activations(ffn, inputs, T), blueprint, rows)
    assert found.captured == pytest.approx(mine / oracle, rel=1e-5)
    assert found.random == pytest.approx(2 / 3 * total / oracle, rel=1e-5)
    assert found.oracle_share == pytest.approx(oracle / total, rel=1e-5)


def test_silence_is_captured_in_full(layer: tuple[FeedForward, LayerBlueprint, torch.Tensor]) -> None:
    ffn, blueprint, x = layer
    assert captured(Activations.of(ffn, x * 0), blueprint, torch.randn(3, D)) == Capture(1.0, 1.0, 1.0, 2 / 3)
