"""Observations of a MoE, each against a plain fp64 restatement that runs the stock model whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from moe_oracle import block_of, is_sigmoid, layers_of, some_windows, stock, watch
from pico_models import PICO_MOE

from upcycle.architectures.moe_families import MOES
from upcycle.calibration.compressing import moe_walk, observe_moe
from upcycle.calibration.compressing.observe_moe import observe_layers, sampled_tokens
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import CheckpointError, RefusalError
from upcycle.methods.compressing.observations import Observations
from upcycle.methods.compressing.observations_file import OBSERVED
from upcycle.methods.compressing.observed_layer import LayerObservations
from upcycle.progress import SILENT

pytestmark = pytest.mark.one_in(4)  # the other cases are long

Models = Callable[..., Path]
CLOSE = 2e-5  # two layers in fp32: a few hundred roundings of 6e-8 each, random walk and cancellation included


def near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    expected = expected.double()
    assert found.shape == expected.shape, what
    error = torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-12)
    assert error < CLOSE, (what, error)


def observed(folder: Path, windows: torch.Tensor) -> Observations:
    with TemporaryDirectory() as made:
        seen = observe_layers(MoeCheckpoint.open(str(folder)), "keep", windows, {}, SILENT, Path(made) / "seen")
        layers = {
            layer: LayerObservations(**{name: getattr(found, name) for name in OBSERVED})
            for layer, found in seen.layers.items()
        }
        return replace(seen, layers=layers)


def test_every_architecture_is_here() -> None:
    assert {model_type for model_type, _ in PICO_MOE.values()} == set(MOES)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", PICO_MOE)
def test_numbers_are_those_of_the_whole_stock_model(
    name: str, fused: bool, pico_moe: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 64)  # three batches
    windows = some_windows()
    model = stock(pico_moe(name, fused))
    found, expected = observed(pico_moe(name, fused), windows), watch(model, windows)
    assert set(found.layers) == set(expected)
    sigmoid, factor = is_sigmoid(model.config), getattr(model.config, "routed_scaling_factor", None) or 1.0
    for index, seen in expected.items():
        layer, weights = found.layers[index], seen.weights
        chosen = torch.zeros_like(weights).scatter(1, seen.ids, 1.0)
        scores = seen.logits.sigmoid() if sigmoid else seen.logits.softmax(-1)
        norms = seen.outputs.norm(dim=-1)
        two = weights.sort(1, descending=True).values
        ratios = torch.quantile(two[:, 1] / two[:, 0], torch.linspace(0, 1, 101).double(), interpolation="nearest")
        cosine = torch.nn.functional.cosine_similarity(seen.before, seen.after, dim=1).mean()
        for what, number in {
            "tokens": torch.tensor([windows.numel()]),
            "load": chosen.sum(0),
            "weight": weights.sum(0),
            "score": (scores / scores.sum(1, keepdim=True)).sum(0),
            "norm": (norms * chosen).sum(0),
            "saliency": (norms * weights).sum(0),
            "logits_gram": seen.logits.T @ seen.logits,
            "ratios": ratios,
            "similarity": cosine[None],
            "bias": seen.bias,
            "factor": torch.tensor([factor]),
            "sample_logits": seen.logits,
            "sample_weights": weights,
            "sample_gram": torch.einsum("ted,tfd->tef", seen.outputs, seen.outputs),
            "sample_inputs": seen.x,
            "mean_output": seen.outputs.mean(0),
            "gated_output": torch.einsum("te,ted->ed", scores / scores.sum(1, keepdim=True), seen.outputs)
            / len(seen.x),
            "input_gram": torch.einsum("te,td,tf->edf", chosen, seen.x, seen.x),
            **shared_numbers(model, index, seen, windows),
        }.items():
            near(getattr(layer, what), number, f"layer {index}: {what}")


def shared_numbers(model: Any, index: int, seen: Any, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the shared experts of a layer do, by their module, which computes the block's output less the routed experts'."""
    beside = (seen.block - seen.routed).norm(dim=1)
    names = ("shared_expert", "shared_experts", "shared_mlp")
    found = [m for n, m in layers_of(model)[index].named_modules() if n.rpartition(".")[2] in names]
    if not found:
        assert beside.max() < 1e-12
        return {"shared": torch.zeros(0), "shared_weight": torch.zeros(1)}
    (module,), weight = found, torch.ones(windows.numel(), 1).double()
    if (gate := getattr(block_of(layers_of(model)[index]), "shared_expert_gate", None)) is not None:
        weight = gate(seen.x).sigmoid().detach()
    torch.testing.assert_close((weight * module(seen.x)).norm(dim=1).detach(), beside)
    tensors = [tensor.detach() for tensor in module.state_dict().values()]
    gate_up = tensors[0].chunk(2) if len(tensors) == 2 else tensors[:2]
    hidden = torch.nn.functional.silu(seen.x @ gate_up[0].T) * (seen.x @ gate_up[1].T)
    return {"shared": (weight * hidden).square().sum(0), "shared_weight": weight.sum()[None]}


def test_a_router_that_cannot_be_read_is_refused(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_walk, "find_routers", lambda _: [])
    with pytest.raises(
        RefusalError, match="layer 0: what the router of this 'mixtral' model does is none of the rules"
    ):
        observed(pico_moe("mixtral"), some_windows())


def test_cosines_of_streams_are_those_of_the_stock_model(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 64)
    windows, model, states = some_windows(), stock(pico_moe("qwen2_moe")), []
    for index, layer in enumerate(layers_of(model)):
        if index == 0:
            layer.register_forward_pre_hook(lambda _, given: states.append(given[0]))
        layer.register_forward_hook(lambda _, __, made: states.append(made[0] if isinstance(made, tuple) else made))
    with torch.no_grad():
        model(windows, use_cache=False)
    cosine = torch.nn.functional.cosine_similarity
    for step in (1, 3):
        monkeypatch.setattr(observe_moe, "stream_step", lambda *_, step=step: step)
        flat = [state.flatten(0, 1)[::step] for state in states]
        expected = torch.stack([torch.stack([cosine(a, b, dim=1).mean() for a in flat]) for b in flat])
        near(observed(pico_moe("qwen2_moe"), windows).streams, expected, "streams")


@pytest.mark.parametrize(("layers", "hidden"), [(2, 32), (48, 2048), (100, 8192), (200, 60000)])
def test_streams_of_large_models_are_kept_of_fewer_tokens(layers: int, hidden: int) -> None:
    step = observe_moe.stream_step(16384, layers, hidden)
    kept = -(-16384 // step)
    assert kept <= 64 or kept * (layers + 1) * hidden <= observe_moe.MOST_STREAMS
    assert kept >= 32


def test_large_models_keep_the_products_of_all_inputs_together(
    pico_moe: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [observe_moe.gram_shape(*sizes) for sizes in ((8, 1024), (64, 2048), (1, 4096), (8, 8192))] == [
        (8, 1024, 1024),
        (1, 2048, 2048),
        (1, 4096, 4096),
        (0,),
    ]
    windows = some_windows()
    expected = watch(stock(pico_moe("mixtral")), windows)
    monkeypatch.setattr(observe_moe, "MOST_GRAM", 2 * 32**2)
    for index, layer in observed(pico_moe("mixtral"), windows).layers.items():
        near(layer.input_gram, (expected[index].x.T @ expected[index].x)[None], "input_gram")


def test_samples_are_spread_evenly_whatever_the_batches_are(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = some_windows(12, 24)  # 288 tokens
    monkeypatch.setattr(observe_moe, "MOST_SAMPLED", 64)
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 72)
    expected = watch(stock(pico_moe("mixtral")), windows)
    for index, layer in observed(pico_moe("mixtral"), windows).layers.items():
        taken = torch.arange(0, 288, 5)  # 288 / 64, rounded up
        assert len(taken) <= 64
        near(layer.sample_logits, expected[index].logits[taken], "sample_logits")
        near(layer.sample_weights, expected[index].weights[taken], "sample_weights")
        near(layer.mean_output, expected[index].outputs[taken].mean(0), "mean_output")


@pytest.mark.parametrize("experts", [4, 64, 256, 1024])
def test_samples_of_many_experts_are_fewer(experts: int) -> None:
    count = sampled_tokens(experts)
    assert 64 <= count <= 2048
    assert count == 64 or count * experts**2 <= 8_000_000


def test_batches_change_nothing_but_roundings(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = some_windows()
    one = observed(pico_moe("dots1"), windows)
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 32)
    for index, layer in observed(pico_moe("dots1"), windows).layers.items():
        for what in ("load", "weight", "saliency", "sample_gram", "similarity"):
            near(getattr(layer, what), getattr(one.layers[index], what), what)


def test_nothing_is_kept_for_a_backward_pass(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of what needs gradients would hold every batch in memory."""
    seen: list[bool] = []
    add = observe_moe._Sums.add
    monkeypatch.setattr(
        observe_moe._Sums, "add", lambda sums, routed: [seen.append(torch.is_grad_enabled()), add(sums, routed)]
    )
    for layer in observed(pico_moe("mixtral"), some_windows()).layers.values():
        assert not any(tensor.requires_grad for tensor in vars(layer).values())
    assert seen
    assert not any(seen)


def test_states_that_overflow_are_an_error_that_names_the_layer(
    pico_moe: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = moe_walk.MoeWalk.run

    def broken(walk: Any, index: int, states: torch.Tensor, *see: Any) -> torch.Tensor:
        return torch.as_tensor(run(walk, index, states, *see) * (float("inf") if index == 1 else 1))

    monkeypatch.setattr(moe_walk.MoeWalk, "run", broken)
    with pytest.raises(CheckpointError, match="layer 1: the calibration states are not finite") as caught:
        observed(pico_moe("mixtral"), some_windows(2))
    assert "dtype" in (caught.value.hint or "")
