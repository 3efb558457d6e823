"""Activations of FFNs of every form against their formulas in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ffn_forms import ACTIVATIONS, FORMS, arrays, ffn_of, neurons

from upcycle.ffn.activations import Activations, contributions
from upcycle.ffn.form import FfnForm
from upcycle.ffn.neurons import Neurons

D, F, T = 6, 20, 9
ONES = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
# fp32: sums of D products of numbers up to about ten, twice multiplied.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def tokens() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(2))


@ONES
def test_they_are_the_formula(form: FfnForm) -> None:
    ffn, x, which = ffn_of(form, F, D, dtype=torch.float32), tokens(), torch.tensor([4, 0, 19])
    expected, own, out = neurons(arrays(ffn), form.activation, x.double().numpy()), Neurons(ffn), torch.empty(T, F)
    own.write(x, out)
    np.testing.assert_allclose(own(x).numpy(), expected, **CLOSE)
    assert torch.equal(own(x), out)
    np.testing.assert_allclose(Neurons(ffn, which)(x).numpy(), expected[:, which.numpy()], **CLOSE)
    (batch,) = Activations.of(ffn, x).batches()
    assert torch.equal(batch.hidden, out)


@ONES
def test_contributions_are_squared_activations_times_squared_columns(form: FfnForm) -> None:
    ffn, x = ffn_of(form, F, D, dtype=torch.float32), tokens()
    own = arrays(ffn)
    expected = (neurons(own, form.activation, x.double().numpy()) ** 2).mean(0) * (own["down"] ** 2).sum(0)
    np.testing.assert_allclose(contributions(Activations.of(ffn, x)).numpy(), expected, rtol=1e-4)


@ONES
def test_of_directions_divides_what_a_row_and_its_bias_say_by_both_lengths(form: FfnForm) -> None:
    ffn, x = ffn_of(form, F, D, dtype=torch.float32), tokens()
    own, xs = arrays(ffn), x.double().numpy()

    def seen(name: str) -> np.ndarray:
        full = xs @ own[name].T + own.get(f"{name}_bias", 0.0)
        both: np.ndarray = full / np.linalg.norm(own[name], axis=1) / np.linalg.norm(xs, axis=1)[:, None]
        return both

    act = ACTIVATIONS[form.activation]
    expected = act(seen("gate")) * seen("up") if form.gated else act(seen("up"))
    np.testing.assert_allclose(Neurons(ffn, unit_rows=True).of_directions(x).numpy(), expected, **CLOSE)
    rows = {name: own[name] / np.linalg.norm(own[name], axis=1, keepdims=True) for name in form.matrices[:-1]}
    rows |= {
        f"{name}_bias": own[f"{name}_bias"] / np.linalg.norm(own[name], axis=1)
        for name in rows
        if f"{name}_bias" in own
    }
    np.testing.assert_allclose(Neurons(ffn, unit_rows=True)(x).numpy(), neurons(rows, form.activation, xs), **CLOSE)


def test_rows_and_tokens_of_zeros_keep_finite_activations() -> None:
    form = FORMS["gated, biases"]
    ffn = ffn_of(form, F, D, dtype=torch.float32)
    ffn.up[3], x = 0.0, tokens()
    x[0] = 0.0
    assert Neurons(ffn, unit_rows=True).of_directions(x).isfinite().all()
