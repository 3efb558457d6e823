"""What a dense FFN is made of, for every gathering, restated in fp64 from the stock model's own experts and what they did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_sources import layer_source, random_matrices, random_observations
from moe_oracle import block_of, layers_of, neurons, stock, watch
from safetensors.torch import load_file

import upcycle
from upcycle.architectures.expert_terms import SHARED_FFN, DenseCut
from upcycle.checkpoints.moe_checkpoint import leading_directions
from upcycle.conversion import compress_conversion
from upcycle.methods.compressing.dense_neurons import fitted_neurons, neuron_scores
from upcycle.methods.compressing.to_dense import ToDense, ToDenseParameters

pytestmark = pytest.mark.one_in(10)  # the other cases are long

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
Ffn = dict[str, torch.Tensor]


def experts_of(layer: Any) -> tuple[list[Ffn], Ffn | None]:
    """The routed experts' matrices, and the shared ones', of a stock layer in fp64."""
    experts = block_of(layer).experts
    routed = []
    for gate_up, down in zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True):
        gate, up = gate_up.chunk(2)
        routed.append({"gate": gate, "up": up, "down": down})
    shared = getattr(block_of(layer), "shared_experts", None)
    if shared is None:
        return routed, None
    return routed, {part: getattr(shared, f"{part}_proj").weight.detach() for part in ("gate", "up", "down")}


def picked(ffn: Ffn, scores: torch.Tensor, count: int, scale: float) -> Ffn:
    taken = sorted(sorted(range(len(scores)), key=lambda j: -float(scores[j]))[:count])
    return {"gate": ffn["gate"][taken], "up": ffn["up"][taken], "down": scale * ffn["down"][:, taken]}


def joined(parts: list[Ffn]) -> Ffn:
    return {
        part: torch.cat([one[part] for one in parts], 1 if part == "down" else 0) for part in ("gate", "up", "down")
    }


def expected(gather: str, layer: Any, seen: Any, width: int) -> Ffn:
    routed, shared = experts_of(layer)
    mean = seen.weights.mean(0)
    beside = [] if shared is None else [shared]
    count = len(routed)
    if gather in ("sum", "average"):
        part = 1 / count if gather == "average" else 1
        total = {name: sum(one[name] * part for one in routed) for name in ("gate", "up", "down")}
        return joined([{**total, "down": mean.sum() * total["down"]}, *beside])
    each = (width - (0 if shared is None else len(shared["gate"]))) // count
    if gather == "top_kg":
        parts = []
        for e, one in enumerate(routed):
            norms = [
                one["gate"][j].norm() ** 2 + one["up"][j].norm() ** 2 + one["down"][:, j].norm() ** 2 for j in range(16)
            ]
            parts.append(picked(one, torch.stack(norms), each, float(mean[e])))
        return joined([*parts, *beside])
    if gather == "svd_kg":
        parts = []
        for e, one in enumerate(routed):
            u = torch.linalg.svd(torch.cat([one["gate"], one["up"], one["down"].T], 1))[0][:, :each]
            u = u * torch.stack([column[column.abs().argmax()].sign() for column in u.T])
            parts.append({"gate": u.T @ one["gate"], "up": u.T @ one["up"], "down": float(mean[e]) * one["down"] @ u})
        return joined([*parts, *beside])
    experts, scores = block_of(layer).experts, []
    for e, one in enumerate(routed):
        active = seen.weights[:, e, None] * neurons(experts, seen.x, e).detach()
        scores.append(active.square().sum(0) * one["down"].square().sum(0))
    if shared is not None:
        active = torch.nn.functional.silu(seen.x @ shared["gate"].T) * (seen.x @ shared["up"].T)
        scores.append(active.square().sum(0) * shared["down"].square().sum(0))
    least = torch.cat(scores).sort(descending=True).values[width - 1]
    scales = [*mean.tolist(), 1.0]
    every = [
        picked(one, s, int((s >= least).sum()), scales[e])
        for e, (one, s) in enumerate(zip([*routed, *beside], scores, strict=True))
    ]
    return joined(every)


@pytest.mark.parametrize("gather", ["neurons", "average", "sum", "top_kg", "svd_kg"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["dots1", "qwen3_moe"])
def test_every_gathering_is_that_of_its_formula(
    name: str, fused: bool, gather: str, pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = pico_moe(name, fused), []
    real = compress_conversion.CompressConversion._observed

    def observed(self: Any, checkpoint: Any, windows: torch.Tensor, *given: Any) -> Any:
        read.append(windows)
        return real(self, checkpoint, windows, *given)

    monkeypatch.setattr(compress_conversion.CompressConversion, "_observed", observed)
    shared = 16 if name == "dots1" else 0
    width = 16 + shared if gather in ("average", "sum") else 24 + shared
    keys = {"width": width, "parameters": {"gather": gather}, "calibration": TEXT, "refit": "none"}
    upcycle.convert(str(source), tmp_path / "out", method="to_dense", **keys, verification={"tokens": 64})
    written = load_file(tmp_path / "out" / "model.safetensors")
    model = stock(source)
    for index, seen in watch(model, read[0]).items():
        for part, matrix in expected(gather, layers_of(model)[index], seen, width).items():
            found = written[f"model.layers.{index}.mlp.{part}_proj.weight"].double()
            assert found.shape == matrix.shape
            # Sums of a few hundred weights in fp32, and of a decomposition a gap of singular values that is not small.
            assert torch.dist(found, matrix) < 1e-4 * torch.linalg.norm(matrix), (index, part)


def test_an_expert_without_neurons_of_rank_is_no_part() -> None:
    seen = random_observations(3)
    seen.neurons[1] = 0
    cut = ToDense(ToDenseParameters()).cut(layer_source(seen), 6)
    assert [part.terms[0].expert for part in cut.parts] == [0, 2]
    assert sum(len(part.terms[0].order or ()) for part in cut.parts) == 6 == cut.width


def test_shared_neurons_are_ranked_with_the_others() -> None:
    from dataclasses import replace

    seen = replace(random_observations(3), shared=torch.full((5,), 1e6), shared_weight=torch.tensor([25.0]).double())
    cut = ToDense(ToDenseParameters()).cut(layer_source(seen), 5)
    assert [(part.terms[0].expert, part.scale) for part in cut.parts] == [(SHARED_FFN, 0.5)]


@pytest.mark.parametrize("first", [0, 1])
def test_fitted_neurons_are_there_once(first: int) -> None:
    """Experts 0 and 1 are the same, and add most: their neurons are the best ones by score twice, and a dense FFN needs them once."""
    seen, own = random_observations(3, tokens=60), random_matrices()
    seen.neurons[:2] = 100.0 + torch.arange(5)
    seen.neurons[first] += 0.5
    source = layer_source(seen, lambda expert: own(max(expert, 1)))
    picked: dict[str, list[tuple[int, int]]] = {}
    for gather in ("neurons", "fitted"):
        cut = ToDense(ToDenseParameters(gather=gather)).cut(source, 10)  # type: ignore[arg-type]
        picked[gather] = [(max(p.terms[0].expert, 1), i) for p in cut.parts for i in p.terms[0].order or ()]
    assert sorted(picked["neurons"]) == sorted([(1, i) for i in range(5)] * 2)
    assert sorted(picked["fitted"]) == [(e, i) for e in (1, 2) for i in range(5)]
    few = fitted_neurons(source, neuron_scores(source), {0: 1.0, 1: 1.0, 2: 1.0}, 5, most=7)
    assert len(few) == 5
    assert set(few.tolist()) < {*range(10)}  # the seven of the largest scores


def test_a_cut_is_read_as_it_was_written() -> None:
    from upcycle.methods.compressing.described_cuts import cut_of, described_cut

    seen = random_observations(3)
    for gather, width in (("neurons", 7), ("average", 5), ("svd_kg", 6)):
        cut = ToDense(ToDenseParameters(gather=gather)).cut(layer_source(seen), width)  # type: ignore[arg-type]
        assert isinstance(cut, DenseCut)
        assert cut_of(json.loads(json.dumps(described_cut(cut)))) == cut


def test_all_directions_hold_all_of_an_experts_products() -> None:
    """A rotation of the neurons changes no product of matrices that share them."""
    ffn = random_matrices(5, 7)(0)
    made = leading_directions(ffn, 5)
    torch.testing.assert_close(made["down"] @ made["up"], ffn["down"] @ ffn["up"])
    torch.testing.assert_close(made["down"] @ made["gate"], ffn["down"] @ ffn["gate"])
    assert not torch.allclose(made["up"], ffn["up"])
