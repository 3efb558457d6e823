"""FFNs of every form, and what they compute in fp64, written from the formulas alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import MATRICES, FfnForm

Arrays = Mapping[str, np.ndarray]
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": np.vectorize(lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2)))),
    "relu": lambda z: np.maximum(z, 0.0),
    "relu2": lambda z: np.maximum(z, 0.0) ** 2,
}
_STEEPEST = 1.2  # more than the largest slope of silu (1.10) and gelu (1.13)
EVERYWHERE = frozenset(MATRICES)
FORMS = {
    "gated": FfnForm("silu"),
    "gated, biases": FfnForm("silu", True, EVERYWHERE),
    "gated, bias on gate": FfnForm("gelu", True, frozenset({"gate"})),
    "ungated": FfnForm("relu", False),
    "ungated, biases": FfnForm("gelu", False, frozenset({"up", "down"})),
    "ungated, bias on down": FfnForm("silu", False, frozenset({"down"})),
}


def ffn_of(form: FfnForm, width: int, hidden: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> FeedForward:
    """Return layer 3 of normal numbers; biases are as large as what they are added to."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    weights = {name: torch.randn(shapes[name], generator=rng, dtype=torch.float64).to(dtype) for name in form.matrices}
    size = {"gate": hidden**0.5, "up": hidden**0.5, "down": width**0.5 * hidden}
    biases = {
        f"{name}_bias": (size[name] * torch.randn(shapes[name][0], generator=rng, dtype=torch.float64)).to(dtype)
        for name in form.matrices
        if name in form.biases
    }
    return FeedForward(
        3,
        weights.get("gate"),
        weights["up"],
        weights["down"],
        torch.ones(hidden, dtype=dtype),
        form.activation,
        **biases,
    )


def arrays(ffn: FeedForward) -> Arrays:
    """Return the FFN's tensors by name, as fp64; those that it lacks are left out."""
    names = (name for matrix in MATRICES for name in (matrix, f"{matrix}_bias"))
    return {name: tensor.double().numpy() for name in names if (tensor := ffn.tensor(name)) is not None}


def neurons(w: Arrays, activation: str, x: np.ndarray) -> np.ndarray:
    """Return ``[t, F]``: ``act(x gate' + a) * (x up' + b)``, or ``act(x up' + b)`` where there is no gate."""
    up = x @ w["up"].T + w.get("up_bias", 0.0)
    if "gate" not in w:
        return ACTIVATIONS[activation](up)
    return ACTIVATIONS[activation](x @ w["gate"].T + w.get("gate_bias", 0.0)) * up


def output(w: Arrays, activation: str, x: np.ndarray) -> np.ndarray:
    """Return ``[t, d]``: the neurons times ``down'``, and the down bias."""
    return neurons(w, activation, x) @ w["down"].T + w.get("down_bias", 0.0)


def rounding(w: Arrays, activation: str, x: np.ndarray, terms: int) -> np.ndarray:
    """Return ``[t, d]``: how far two fp64 computations of :func:`output` may lie apart if they add in different orders.

    A sum of n products is off by at most ``n u`` times the sum of their magnitudes, u being fp64's unit roundoff. An error e
    before the activation is at most ``_STEEPEST * e`` behind it, and ``terms`` more roundings are made of every neuron's
    output: by the activation, the router's weights, a scale, and the sum over the experts.
    """
    u, size = 2.0**-53, x.shape[1] + 2
    before = {
        name: size * u * (np.abs(x) @ np.abs(w[name]).T + np.abs(w.get(f"{name}_bias", 0.0)))
        for name in ("gate", "up")
        if name in w
    }
    up = np.abs(x @ w["up"].T + w.get("up_bias", 0.0))
    if "gate" in w:
        act = np.abs(ACTIVATIONS[activation](x @ w["gate"].T + w.get("gate_bias", 0.0)))
        error, hidden = _STEEPEST * before["gate"] * up + act * before["up"], act * up
    else:
        error, hidden = _STEEPEST * before["up"], np.abs(ACTIVATIONS[activation](up))
        hidden = np.maximum(hidden, np.abs(neurons(w, activation, x)))
    down = np.abs(w["down"]).T
    products = hidden @ down + np.abs(w.get("down_bias", 0.0))
    return 2 * (error @ down + (down.shape[0] + terms) * u * products)
