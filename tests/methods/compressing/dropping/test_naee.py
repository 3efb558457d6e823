"""NAEE: its error is that of a stock block whose experts are really gone, and the search finds the least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layer_sources import layer_source, random_observations
from moe_oracle import block_of, is_sigmoid, layers_of, some_windows, stock, watch, without_experts
from pico_models import PICO_MOE

from upcycle.calibration.compressing.observe_moe import observe_layers
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.methods.compressing.dropping.naee import Naee, NaeeParameters, error_of, kept_weights, removal_errors
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.progress import SILENT

Models = Callable[..., Path]
SETS = [list(kept) for count in (2, 3) for kept in itertools.combinations(range(4), count)]


def naee(most_sets: int = 2000, swaps: int = 200) -> Naee:
    return Naee(NaeeParameters(most_sets=most_sets, swaps=swaps))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", PICO_MOE)
def test_errors_and_weights_are_those_of_a_stock_block_without_the_experts(
    name: str, pico_moe: Models, tmp_path: Path
) -> None:
    folder, windows = pico_moe(name), some_windows(4, 24)
    model, checkpoint = stock(folder), MoeCheckpoint.open(str(folder))
    whole = watch(model, windows)
    seen = observe_layers(checkpoint, "keep", windows, {}, SILENT, tmp_path / "seen")
    for kept in SETS:
        smaller = without_experts(model, folder, dict.fromkeys(whole, kept))
        for index, uncut in whole.items():
            block, made = block_of(layers_of(smaller)[index]), []
            handle = block.experts.register_forward_hook(
                lambda _, given, output, made=made: made.append((given, output))
            )
            with torch.no_grad():
                block(*uncut.arguments)
            handle.remove()
            (((_, ids, weights, *_), output),) = made
            output = output.reshape(uncut.routed.shape)
            expected = (uncut.routed - output).square().sum() / uncut.routed.square().sum()
            source = layer_source(
                seen.layers[index],
                top_k=checkpoint.model.top_k,
                normalized=checkpoint.model.normalized,
                sigmoid=checkpoint.model.sigmoid,
                jitter=checkpoint.model.jitter,
            )
            assert source.sigmoid == is_sigmoid(model.config)
            assert error_of(source, kept) == pytest.approx(float(expected), rel=1e-4, abs=1e-9)
            spread = torch.zeros(len(uncut.x), 4).double()
            spread[:, kept] = torch.zeros(len(uncut.x), len(kept)).double().scatter(1, ids, weights.double())
            assert torch.allclose(kept_weights(source, kept), spread, rtol=1e-4, atol=1e-6)


def test_all_experts_leave_no_error_and_none_is_free() -> None:
    source = layer_source(random_observations(5))
    assert error_of(source, [*range(5)]) < 1e-24
    assert all(error_of(source, [e for e in range(5) if e != gone]) > 1e-6 for gone in range(5))


def test_experts_that_put_out_nothing_are_an_error_of_zero() -> None:
    seen = random_observations(4)
    source = layer_source(replace(seen, sample_gram=torch.zeros_like(seen.sample_gram)))
    assert error_of(source, [0, 1]) == 0.0


def brute_force(source: LayerSource, keep: int) -> tuple[int, ...]:
    return min(itertools.combinations(range(source.seen.experts), keep), key=lambda kept: error_of(source, list(kept)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", [2, 3, 5])
def test_few_sets_are_all_tried(seed: int, keep: int) -> None:
    source = layer_source(random_observations(6, seed))
    assert naee().cut(source, keep).rows == brute_force(source, keep)


@pytest.mark.parametrize("seed", range(5))
def test_beyond_experts_leave_one_by_one_and_no_exchange_helps(seed: int) -> None:
    source = layer_source(random_observations(8, seed))
    greedy, found = naee(1, 0).cut(source, 4).rows, naee(1, 10_000).cut(source, 4).rows
    kept = [*range(8)]
    for _ in range(4):
        kept.remove(min(kept, key=lambda gone: error_of(source, [e for e in kept if e != gone])))
    assert greedy == tuple(kept)
    least = error_of(source, list(found))
    assert error_of(source, list(brute_force(source, 4))) <= least <= error_of(source, kept)
    for gone, taken in itertools.product(found, set(range(8)) - set(found)):
        assert error_of(source, [taken, *(e for e in found if e != gone)]) >= least


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_errors_without_each_expert_are_those_of_every_set(sigmoid: bool, normalized: bool, biased: bool) -> None:
    seen = random_observations(9, top_k=3)
    logits = 4 * seen.sample_logits
    logits[0, 2] = 60.0  # one expert has all of a token's score
    bias = torch.randn(9, generator=torch.Generator().manual_seed(1)).double() if biased else seen.bias
    changed = replace(seen, sample_logits=logits, bias=bias, factor=torch.tensor([1.7]).double())
    source = layer_source(changed, sigmoid=sigmoid, normalized=normalized, top_k=3)
    for kept in ([*range(9)], [1, 2, 4, 5, 7, 8], [0, 2, 3, 8]):
        expected = [error_of(source, [e for e in kept if e != gone]) for gone in kept]
        assert removal_errors(source, kept).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_exchanges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from upcycle.methods.compressing.dropping import naee as module

    tried = []
    monkeypatch.setattr(
        module, "error_of", lambda source, kept: tried.append(kept) or -float(len(tried))
    )  # always better
    naee(1, 7)._exchanged(layer_source(random_observations(8)), [0, 1, 2, 3])
    assert len(tried) == 1 + 7
