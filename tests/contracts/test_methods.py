"""What every registered method and splitter promises."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ffn_forms import FORMS, arrays, ffn_of, output, rounding
from torch.nn.functional import linear, silu

from upcycle.calibration.decide_layer import generator
from upcycle.conversion.jobs import job_of
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, BlueprintFile, LayerBlueprint, save_blueprint
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm
from upcycle.ffn.moe_shape import MoeShape, Part
from upcycle.methods.base import Method
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.registry import METHODS, load

D, F, E, S = 16, 96, 8, 4
NEEDS = {"coactivation_graph": "pymetis"}
# Parameters with which a method that draws neurons anew keeps the dense function, and how many shared experts methods of
# copies are asked for. All make E = 8 experts.
EXACT = {"drop_upcycling": {"ratio": 0.0}, "qwen_fine_grained": {"reset": 0.0}}
SHARED = {"shared_plus_routed": (S,)}
NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(find_spec(NEEDS.get(name, "torch")) is None, reason=f"{name} needs more")
    )
    for name in METHODS
    if load("method", name).kind
    not in ("growth", "addition", "pruning", "compression", "narrowing", "beside")  # these have files of their own
]


def ffn(dtype: torch.dtype = torch.float64, width: int = F) -> FeedForward:
    rng = torch.Generator().manual_seed(7)
    gate, up, down = (torch.randn(shape, generator=rng, dtype=dtype) for shape in ((width, D), (width, D), (D, width)))
    return FeedForward(3, gate, up, down, torch.ones(D, dtype=dtype), "silu")


def made(name: str, **parameters: Any) -> Method:
    cls = load("method", name)
    return cls(cls.Parameters(**parameters))


def activations(dense: FeedForward, tokens: int = 200) -> Activations:
    rng = torch.Generator().manual_seed(8)
    importance = torch.rand(E, dense.intermediate_size, generator=rng)
    return Activations.of(dense, torch.randn(tokens, D, generator=rng), batch=64, importance=importance)


def blueprint(method: Method, dense: FeedForward, shape: MoeShape, scale: float = 1.0, seed: int = 0) -> LayerBlueprint:
    """As a conversion makes it: only calibrated methods are given activations."""
    given = activations(dense) if method.calibrated else None
    return method.blueprint(dense, shape, scale, generator(seed, dense.layer, "method"), given)


def shapes(method: Method, width: int = F, pad: bool = False) -> list[MoeShape]:
    shared = SHARED.get(method.name, (0,)) if method.kind == "copies" else (0, S)
    return [MoeShape(E, E, s, method.expert_size(width, E, s, pad), (3,)) for s in shared]


@pytest.mark.parametrize("name", NAMES)
def test_all_experts_at_equal_weight_are_the_dense_ffn(name: str) -> None:
    method, dense = made(name, **EXACT.get(name, {})), ffn()
    assert method.exact_when_all_active or name == "qwen_fine_grained"  # exact by coincidence: 8 quarters are 2 copies
    x = torch.randn(5, D, dtype=torch.float64)
    expected = linear(silu(linear(x, dense.gate)) * linear(x, dense.up), dense.down)
    for shape in shapes(method):
        tensors = ExpertTensors(dense, blueprint(method, dense, shape, method.scale("exact", E, E)))

        def run(prefix: str, e: int, tensors: ExpertTensors = tensors) -> torch.Tensor:
            gate, up, down = (tensors.part(Part(f"{prefix}{kind}", e)) for kind in ("gate", "up", "down"))  # type: ignore[arg-type]
            return linear(silu(linear(x, gate)) * linear(x, up), down)

        total = torch.stack([run("", e) for e in range(E)]).mean(0)
        if shape.shared:
            total = total + run("shared_", 0)
        # fp64: a few hundred products of order one.
        assert torch.linalg.norm(total - expected) <= 1e-13 * torch.linalg.norm(expected)


def layer_output(tensors: ExpertTensors, shape: MoeShape, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``[t, d]``: the shared expert and the weighted sum of the routed ones, from every tensor that a target could store."""
    form = shape.form

    def expert(prefix: str, e: int = 0) -> np.ndarray:
        names = [*form.matrices, *(f"{matrix}_bias" for matrix in form.matrices)]
        built = {name: tensors.part(Part(f"{prefix}{name}", e)).numpy() for name in names}  # type: ignore[arg-type]
        return output(built, form.activation, x)

    routed = sum(weights[:, e, None] * expert("", e) for e in range(shape.experts))
    return routed + (expert("shared_") if shape.shared else 0.0)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("name", NAMES)
def test_all_experts_at_equal_weight_are_the_dense_ffn_of_every_form(name: str, form: FfnForm) -> None:
    method, dense = made(name, **EXACT.get(name, {})), ffn_of(form, F, D)
    x = np.random.default_rng(4).standard_normal((5, D))
    own = arrays(dense)
    expected, allowed = output(own, form.activation, x), rounding(own, form.activation, x, terms=E + 8)
    for shape in (replace(shape, form=form) for shape in shapes(method)):
        method.check(shape)
        tensors = ExpertTensors(dense, blueprint(method, dense, shape, method.scale("exact", E, E)))
        found = layer_output(tensors, shape, np.full((len(x), E), 1 / E), x)
        assert (np.abs(found - expected) <= allowed).all()


@pytest.mark.parametrize("form", [FORMS["gated, biases"], FORMS["ungated, biases"]], ids=["gated", "ungated"])
@pytest.mark.parametrize("name", [param for param in NAMES if made(str(param.values[0])).exact_with_any_router])
def test_biased_copies_are_the_dense_ffn_under_any_router_that_they_promise_it_for(name: str, form: FfnForm) -> None:
    method, dense = made(name, **EXACT.get(name, {})), ffn_of(form, F, D)
    rng = np.random.default_rng(5)
    x, own = rng.standard_normal((5, D)), arrays(dense)
    group = getattr(method.parameters, "granularity", 1)  # so many neighbours have one router row
    for shape in (replace(shape, form=form, top_k=group) for shape in shapes(method)):
        tensors = ExpertTensors(dense, blueprint(method, dense, shape, method.scale("exact", E, group)))
        weights = np.zeros((len(x), E // group))
        weights[np.arange(len(x)), rng.integers(0, E // group, len(x))] = 1 / group
        found = layer_output(tensors, shape, weights.repeat(group, axis=1), x)
        allowed = rounding(own, form.activation, x, terms=E + 8)
        assert (np.abs(found - output(own, form.activation, x)) <= allowed).all()


@pytest.mark.parametrize("name", [param for param in NAMES if made(str(param.values[0])).kind == "partition"])
def test_the_down_bias_is_added_once_however_few_experts_of_a_split_run(name: str) -> None:
    """At any scale, the output of a layer whose neurons are silent is the bias."""
    method, form = made(name), FORMS["ungated, biases"]
    dense = replace(
        ffn_of(form, F, D), up=torch.zeros(F, D, dtype=torch.float64), up_bias=torch.zeros(F, dtype=torch.float64)
    )
    assert dense.down_bias is not None
    weights = np.zeros((1, E))
    weights[0, :3] = 0.5, 0.25, 0.25
    for shape in (replace(shape, form=form, top_k=3) for shape in shapes(method)):
        tensors = ExpertTensors(dense, blueprint(method, dense, shape, scale=3.0))
        found = layer_output(tensors, shape, weights, np.ones((1, D)))
        np.testing.assert_array_equal(found[0], dense.down_bias.numpy())


@pytest.mark.parametrize("name", NAMES)
def test_neurons_are_used_as_declared(name: str) -> None:
    method, dense = made(name), ffn()
    for shape in shapes(method):
        found = blueprint(method, dense, shape)
        assert len(found.routed) == E
        assert len(found.shared) == shape.shared
        assert found.layer == dense.layer
        everyone = [expert.neurons for expert in found.shared + found.routed]
        assert {len(neurons) for neurons in everyone} == {shape.expert_size}
        if method.kind == "partition":
            assert torch.equal(torch.cat(everyone).sort().values, torch.arange(F))
        else:  # every neuron that is routed at all is in equally many routed experts, and the others are shared
            shared = torch.cat([torch.arange(0), *(expert.neurons for expert in found.shared)])
            routed = torch.cat([expert.neurons for expert in found.routed]).bincount(minlength=F)
            assert set(routed.tolist()) <= {0, E * shape.expert_size // (F - len(shared))}
            assert torch.equal((routed == 0).nonzero().flatten(), shared.sort().values)


@pytest.mark.parametrize("name", [param for param in NAMES if made(str(param.values[0])).kind == "copies"])
def test_random_weights_are_the_same_in_any_order_and_from_the_saved_blueprint(name: str, tmp_path: Path) -> None:
    drawn = {"noise": 0.1} if name == "sparse_upcycling" else {}
    method, dense = made(name, **drawn), ffn(torch.bfloat16)
    (shape,) = shapes(method)
    found = blueprint(method, dense, shape, scale=3.0)
    if found.draws is not None and found.draws.rule == "initializer":
        found = replace(found, draws=replace(found.draws, std=0.02))
    save_blueprint(tmp_path / "b.safetensors", found)
    saved = BlueprintFile(tmp_path / "b.safetensors").layer(3)
    assert (saved.draws, saved.spread) == (found.draws, found.spread)
    parts = [Part(kind, e) for e in range(E) for kind in ("gate", "up", "down")]  # type: ignore[arg-type]
    if shape.shared:
        parts += [Part("shared_gate"), Part("shared_up"), Part("shared_down", factor=2.0)]
    first, second = ExpertTensors(dense, found), ExpertTensors(dense, saved)
    forward = [first.part(part) for part in parts]
    backward = [second.part(part) for part in reversed(parts)]
    assert all(map(torch.equal, forward, reversed(backward)))
    assert all(tensor.dtype == torch.bfloat16 for tensor in forward)
    assert method.draws == (found.draws is not None)


@pytest.mark.parametrize("name", [param for param in NAMES if made(str(param.values[0])).kind == "partition"])
@pytest.mark.parametrize("shared", [0, 1])
def test_padding_uses_every_neuron_once_and_zeros_for_the_rest(name: str, shared: int) -> None:
    method, dense = made(name), ffn(width=90)
    shape = MoeShape(E, E, shared, method.expert_size(90, E, shared, pad=True), (3,))
    assert shape.expert_size % 8 == 0
    found = blueprint(method, dense, shape)
    taken = torch.cat([expert.neurons for expert in found.shared + found.routed])
    assert torch.equal(taken[taken != ZERO_NEURON].sort().values, torch.arange(90))
    assert int((taken == ZERO_NEURON).sum()) == (E + shared) * shape.expert_size - 90
    real = [int((expert.neurons != ZERO_NEURON).sum()) for expert in found.routed]
    assert max(real) - min(real) <= 1
    tensors = ExpertTensors(dense, found)
    for e, expert in enumerate(found.routed):
        zero = expert.neurons == ZERO_NEURON
        assert not tensors.part(Part("gate", e))[zero].any()
        assert not tensors.part(Part("down", e))[:, zero].any()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_blueprint_and_inputs_untouched(name: str) -> None:
    method, dense = made(name), ffn()
    assert dense.gate is not None
    before = [tensor.clone() for tensor in (dense.gate, dense.up, dense.down, dense.norm)]
    for shape in shapes(method):
        first, second = (blueprint(method, dense, shape, seed=5) for _ in range(2))
        for a, b in zip(first.routed + first.shared, second.routed + second.shared, strict=True):
            assert torch.equal(a.neurons, b.neurons)
            assert (a.fresh is None and b.fresh is None) or torch.equal(a.fresh, b.fresh)
        assert first.draws == second.draws
    assert all(map(torch.equal, before, (dense.gate, dense.up, dense.down, dense.norm)))


@pytest.mark.parametrize("name", [param for param in NAMES if made(str(param.values[0])).calibrated])
def test_text_that_activates_nothing_is_no_reason_to_stop(name: str) -> None:
    method, dense = made(name), ffn()
    for shape in shapes(method):
        silent = Activations.of(dense, torch.zeros(40, D), importance=torch.zeros(E, F))
        found = method.blueprint(dense, shape, 1.0, generator(0, 3, "method"), silent)
        taken = torch.cat([expert.neurons for expert in found.shared + found.routed])
        copies = E if method.kind == "copies" else 1
        assert torch.equal(taken.sort().values, torch.arange(F).repeat_interleave(copies))


@pytest.mark.parametrize("name", [param for param in NAMES if made(str(param.values[0])).calibrated])
def test_calibrated_methods_ask_for_text(name: str) -> None:
    method = made(name)
    with pytest.raises(UsageError) as caught:
        method.blueprint(ffn(), shapes(method)[0], 1.0, generator(0, 3, "method"))
    assert "--calibration" in str(caught.value.hint)


def test_random_split_differs_between_layers_and_seeds() -> None:
    method, dense = made("random_split"), ffn()
    (shape, _) = shapes(method)
    drawn = [
        torch.cat([e.neurons for e in method.blueprint(dense, shape, 1.0, generator(*key, "method")).routed])
        for key in ((0, 3), (0, 4), (1, 3))
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("convention", "expected"), [("exact", 8.0), ("sum", 2.0), ("paper", 4.0)])
def test_scale_conventions_of_a_partition(convention: str, expected: float) -> None:
    assert made("random_split").scale(convention, 8, 2) == expected  # type: ignore[arg-type]


def test_the_papers_scale_counts_shared_experts() -> None:
    """LLaMA-MoE's script converts to 7 routed experts, one of them chosen, and one that is always on, with a factor of 4.0."""
    assert made("importance").scale("paper", 7, 1, 1) == 4.0
    for experts, top_k, expected in ((16, 4, 4.0), (8, 2, 4.0), (16, 2, 8.0)):
        assert made("importance").scale("paper", experts, top_k) == expected
    job = job_of(parse_recipe({"source": "demo", "method": "random_split", "experts": 7, "shared": 1, "top_k": 1, "scale": "paper",
                               "pad": True, "target": "qwen2_moe"}, "here"))  # fmt: skip
    assert job.scale == 4.0
    assert made("random_split").scale("exact", 7, 1, 1) == 7.0
