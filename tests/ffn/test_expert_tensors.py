"""Every part that can be built of an FFN and a blueprint, against the blueprint's meaning written out neuron by neuron."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from ffn_forms import FORMS, arrays, ffn_of

from upcycle.errors import RefusalError
from upcycle.ffn.blueprint import ZERO_NEURON, Draws, ExpertSpec, LayerBlueprint
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm
from upcycle.ffn.moe_shape import Part, PartKind
from upcycle.ffn.router_network import RouterForm

D, F = 4, 10
SHARED = ([8, 9, 0], [2, 2, 5])
ROUTED = ([0, 1, 2], [7, 3, ZERO_NEURON], [5, 5, 9])
SPREAD, SCALE = (0.25, 0.5, 2.0), 3.0
EVERY_BIAS = FORMS["gated, biases"]
NAMES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def blueprint(**keys: object) -> LayerBlueprint:
    routed, shared = (tuple(ExpertSpec(torch.tensor(neurons)) for neurons in kind) for kind in (ROUTED, SHARED))
    made = LayerBlueprint(3, routed, 2, SCALE, shared, router=torch.arange(3.0 * D).view(3, D), spread=SPREAD)
    return replace(made, **keys)  # type: ignore[arg-type]


def taken(own: dict[str, np.ndarray], name: str, neurons: list[int]) -> np.ndarray:
    """One neuron after another: its row of gate and up, its column of down, its entry of a bias."""
    tensor = own[name].T if name == "down" else own[name]
    rows = np.stack([tensor[j] if j != ZERO_NEURON else np.zeros_like(tensor[0]) for j in neurons])
    return rows.T if name == "down" else rows


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_parts_are_neurons_times_powers_of_the_scale(form: FfnForm) -> None:
    ffn = ffn_of(form, F, D)
    own, tensors = dict(arrays(ffn)), ExpertTensors(ffn, blueprint())
    powers = dict(zip(("gate", "up", "down"), SPREAD, strict=True))
    beside = [j for neurons in SHARED for j in neurons]
    for name in own.keys() - {"down_bias"}:
        factor = SCALE ** powers[name.removesuffix("_bias")]
        for e, neurons in enumerate(ROUTED):
            found = tensors.part(Part(name, e, factor=2.0)).numpy()  # type: ignore[arg-type]
            np.testing.assert_allclose(found, 2 * factor * taken(own, name, neurons), rtol=1e-15)
        found = tensors.part(Part(f"shared_{name}", factor=2.0)).numpy()  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, 2 * taken(own, name, beside))
    for name in {f"{matrix}_bias" for matrix in form.matrices} - own.keys():  # a bias that is not there is zero
        assert not tensors.part(Part(name, 1)).any()  # type: ignore[arg-type]
        assert not tensors.part(Part(f"shared_{name}")).any()  # type: ignore[arg-type]


def test_every_kind_of_part_has_its_shape_and_dtype() -> None:
    ffn = ffn_of(EVERY_BIAS, F, D, dtype=torch.bfloat16)
    whole = replace(blueprint(), router_hidden=torch.ones(7, D), router_form=RouterForm(7))
    tensors, m, wide = ExpertTensors(ffn, whole), 3, 6
    shapes: dict[str, tuple[int, ...]] = {"router": (3, D), "shared_switch": (1, D), "zeros": (5,), "filled": (5,)}
    shapes |= {"shifted_gate_up": (D, 2 * m), "shifted_gate_up_bias": (2 * m,), "shifted_down": (m, D)}
    shapes |= {"router_hidden": (7, D), "output_bias": (D,)}
    shapes |= {"gate_up": (2 * m, D), "gate_up_bias": (2 * m,), "down_rows": (m, D)}
    for prefix, size in (("", m), ("shared_", wide), ("idle_", 5)):
        shapes |= {f"{prefix}{name}": (size, D) for name in ("gate", "up")} | {f"{prefix}down": (D, size)}
        shapes |= {f"{prefix}{name}_bias": (size,) for name in ("gate", "up")} | {f"{prefix}down_bias": (D,)}
    assert set(shapes) == set(get_args(PartKind))
    for kind, shape in shapes.items():
        found = tensors.part(Part(kind, size=5))  # type: ignore[arg-type]
        assert tuple(found.shape) == shape
        assert found.dtype == (torch.float32 if kind == "zeros" else torch.bfloat16)
        assert tensors.part(Part(kind, size=5)).equal(found)  # type: ignore[arg-type]


def test_parts_for_the_kernels_alternate_gate_and_up_and_turn_down() -> None:
    tensors = ExpertTensors(ffn_of(EVERY_BIAS, F, D), blueprint())
    for kind, end in (("gate_up", ""), ("gate_up_bias", "_bias")):
        found = tensors.part(Part(kind, 1, factor=2.0))  # type: ignore[arg-type]
        for first, matrix in enumerate(("gate", "up")):
            assert found[first::2].equal(tensors.part(Part(f"{matrix}{end}", 1, factor=2.0)))  # type: ignore[arg-type]
    assert tensors.part(Part("down_rows", 2)).equal(tensors.part(Part("down", 2)).T)


def test_an_idle_expert_is_the_first_neurons_and_adds_nothing() -> None:
    ffn = ffn_of(EVERY_BIAS, F, D)
    tensors = ExpertTensors(ffn, blueprint())
    for name in ("gate", "up", "gate_bias", "up_bias"):
        dense = ffn.tensor(name)
        assert dense is not None
        assert torch.equal(tensors.part(Part(f"idle_{name}", size=4)), dense[:4])  # type: ignore[arg-type]
    for name in ("down", "down_bias"):
        assert not tensors.part(Part(f"idle_{name}", size=4)).any()  # type: ignore[arg-type]


def test_the_down_bias_is_whole_in_every_routed_expert_and_in_no_shared_piece() -> None:
    ffn = ffn_of(EVERY_BIAS, F, D)
    tensors = ExpertTensors(ffn, blueprint())
    assert ffn.down_bias is not None
    for e in range(3):
        assert torch.equal(tensors.part(Part("down_bias", e)), ffn.down_bias)
        assert torch.equal(tensors.part(Part("down_bias", e, factor=0.5)), ffn.down_bias / 2)
    assert not tensors.part(Part("shared_down_bias")).any()


def test_experts_of_other_models_bring_their_weights_and_their_bias_once() -> None:
    models = [ffn_of(EVERY_BIAS, F, D, seed=seed) for seed in (1, 2)]
    routed = tuple(ExpertSpec(torch.tensor(neurons), source=0, scale=0.5) for neurons in ROUTED)
    # Two pieces of one FFN.
    shared = tuple(ExpertSpec(torch.tensor(neurons), source=1, scale=4.0) for neurons in SHARED)

    def read(source: int, name: str) -> torch.Tensor:
        found = models[source].tensor(name)
        assert found is not None
        return found

    tensors = ExpertTensors(ffn_of(EVERY_BIAS, F, D), blueprint(routed=routed, shared=shared), read)
    first, second = (dict(arrays(model)) for model in models)
    np.testing.assert_allclose(
        tensors.part(Part("down", 0)).numpy(), 0.5 * SCALE**2 * taken(first, "down", ROUTED[0]), rtol=1e-15
    )
    np.testing.assert_allclose(
        tensors.part(Part("up_bias", 1)).numpy(), SCALE**0.5 * taken(first, "up_bias", ROUTED[1]), rtol=1e-15
    )
    np.testing.assert_array_equal(tensors.part(Part("down_bias", 2)).numpy(), 0.5 * first["down_bias"])
    np.testing.assert_array_equal(
        tensors.part(Part("shared_up")).numpy(), taken(second, "up", [j for neurons in SHARED for j in neurons])
    )
    np.testing.assert_array_equal(tensors.part(Part("shared_down_bias")).numpy(), 4 * second["down_bias"])


def test_a_refit_replaces_the_columns_of_down_and_nothing_else() -> None:
    ffn, columns = ffn_of(EVERY_BIAS, F, D), torch.arange(D * 15.0, dtype=torch.float64).view(D, 15)
    plain, fitted = (ExpertTensors(ffn, blueprint(down=down, spread=(0.0, 0.0, 1.0))) for down in (None, columns))
    assert torch.equal(fitted.part(Part("shared_down")), columns[:, :6])
    for e in range(3):
        assert torch.equal(fitted.part(Part("down", e)), SCALE * columns[:, 6 + 3 * e : 9 + 3 * e])
        for name in ("gate", "up", "gate_bias", "up_bias", "down_bias"):
            parts = [tensors.part(Part(name, e)) for tensors in (plain, fitted)]  # type: ignore[arg-type]
            assert torch.equal(*parts)


def drawn(draws: Draws, width: int = 4000) -> tuple[FeedForward, ExpertTensors, torch.Tensor]:
    """An expert with every other neuron re-initialised, of an FFN whose biases are not centred."""
    ffn = ffn_of(EVERY_BIAS, width, D)
    assert ffn.up_bias is not None
    ffn = replace(ffn, up_bias=ffn.up_bias + 5)
    fresh = (torch.arange(width) % 2 == 0).expand(3, -1)
    spec = ExpertSpec(torch.arange(width), fresh)
    return ffn, ExpertTensors(ffn, LayerBlueprint(3, (spec,), 1, 1.0, draws=draws)), fresh[0]


def test_biases_of_fresh_neurons_follow_the_rule_of_their_weights() -> None:
    ffn, tensors, fresh = drawn(Draws(3, "statistics"))
    assert ffn.up_bias is not None
    found, replaced = tensors.part(Part("up_bias")), ffn.up_bias[fresh].numpy()
    assert torch.equal(found[~fresh], ffn.up_bias[~fresh])
    new = found[fresh].numpy()
    # 2000 normal numbers: five standard errors of their mean and of their deviation.
    assert abs(new.mean() - replaced.mean()) < 5 * replaced.std() / 2000**0.5
    assert abs(new.std() / replaced.std() - 1) < 5 / 4000**0.5
    ffn, tensors, fresh = drawn(Draws(3, "initializer", 0.02))
    assert not tensors.part(Part("up_bias"))[fresh].any()
    assert torch.equal(tensors.part(Part("down_bias")), ffn.down_bias)


def test_noise_is_added_to_matrices_alone() -> None:
    ffn = ffn_of(EVERY_BIAS, F, D)
    spec = ExpertSpec(torch.arange(F), noise=0.1)
    tensors = ExpertTensors(ffn, LayerBlueprint(3, (spec,), 1, 1.0, draws=Draws(3, noise=0.1)))
    for name in NAMES:
        assert torch.equal(tensors.part(Part(name)), ffn.tensor(name)) == name.endswith("_bias")  # type: ignore[arg-type]


def test_a_gate_that_is_not_there_is_refused() -> None:
    tensors = ExpertTensors(ffn_of(FORMS["ungated"], F, D), blueprint())
    for kind in ("gate", "shared_gate", "idle_gate"):
        with pytest.raises(RefusalError, match="layer 3: the FFN has no gate"):
            tensors.part(Part(kind, size=2))  # type: ignore[arg-type]
