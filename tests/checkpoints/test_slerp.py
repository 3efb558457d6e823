"""Interpolation on the sphere: from inner products alone, against the formula on the vectors themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from upcycle.checkpoints.slerp import slerp_coefficients

EPSILON = 2.0**-52


def joined_one_by_one(vectors: np.ndarray, weights: list[float]) -> np.ndarray:
    """The formula again, on the vectors, number by number."""
    result, total = list(vectors[0]), weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total += weight
        t = weight / total
        lengths = [math.sqrt(sum(x * x for x in v)) for v in (result, vector)]
        a, b = ([x / length for x in v] for v, length in zip((result, vector), lengths, strict=True))
        theta = math.acos(sum(x * y for x, y in zip(a, b, strict=True)))
        length = (1 - t) * lengths[0] + t * lengths[1]
        result = [
            length * (math.sin((1 - t) * theta) * x + math.sin(t * theta) * y) / math.sin(theta)
            for x, y in zip(a, b, strict=True)
        ]
    return np.array(result)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("spread", [3.0, 0.1])
def test_coefficients_are_the_formulas(weights: list[float], spread: float) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal(20) + spread * rng.standard_normal((len(weights), 20))
    coefficients = slerp_coefficients((vectors @ vectors.T).tolist(), weights)
    expected = joined_one_by_one(vectors, weights)
    result = np.array(coefficients) @ vectors
    # An angle of 0.1 loses two digits of the cosine's sixteen; a few dozen operations each.
    assert np.linalg.norm(result - expected) < 1e5 * EPSILON * np.linalg.norm(expected)
    # As long as the vectors are in the weighted mean, and the angle is divided as the weights say.
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.linalg.norm(result) == pytest.approx(np.average(lengths, weights=weights), rel=1e5 * EPSILON)
    if len(weights) == 2:
        whole, part = (math.acos(v @ vectors[0] / np.linalg.norm(v) / lengths[0]) for v in (vectors[1], result))
        assert part / whole == pytest.approx(weights[1] / sum(weights), rel=1e-9)


def test_two_unit_vectors_by_hand() -> None:
    third = slerp_coefficients([[1.0, 0.0], [0.0, 1.0]], [2.0, 1.0])
    assert third == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)], rel=4 * EPSILON)


@pytest.mark.parametrize(
    ("vectors", "weights", "expected"),
    [
        ([[1.0, 2.0], [3.0, 6.0]], [1.0, 3.0], [2.5, 5.0]),  # parallel: linear
        ([[1.0, 2.0], [-3.0, -6.0]], [1.0, 3.0], [-2.0, -4.0]),  # half a turn has no shortest way: linear
        ([[0.0, 0.0], [3.0, 6.0]], [1.0, 3.0], [2.25, 4.5]),
        ([[3.0, 6.0], [0.0, 0.0]], [1.0, 3.0], [0.75, 1.5]),
        ([[0.0, 0.0], [0.0, 0.0]], [1.0, 3.0], [0.0, 0.0]),
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [1.0, 1.0, 1.0], [0.0, 1 / 3]),  # the first two cancel out
    ],
)
def test_where_there_is_no_angle_steps_are_linear(
    vectors: list[list[float]], weights: list[float], expected: list[float]
) -> None:
    v = np.array(vectors)
    assert np.array(slerp_coefficients((v @ v.T).tolist(), weights)) @ v == pytest.approx(expected, rel=8 * EPSILON)


def test_the_order_decides_where_three_are_joined() -> None:
    v = np.random.default_rng(1).standard_normal((3, 6))
    results = []
    for order in ([0, 1, 2], [2, 1, 0]):
        w = v[order]
        results.append(np.array(slerp_coefficients((w @ w.T).tolist(), [1.0, 1.0, 1.0])) @ w)
    assert np.linalg.norm(results[0]) == pytest.approx(np.linalg.norm(results[1]), rel=1e-12)
    assert np.linalg.norm(results[0] - results[1]) > 1e-3


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_vectors_come_out_bit_for_bit(count: int) -> None:
    vector = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    product = float(vector.astype(np.float64) @ vector.astype(np.float64))
    coefficients = slerp_coefficients([[product] * count] * count, [1.0 + i for i in range(count)])
    total = sum(vector.astype(np.float64) * c for c in coefficients)
    assert np.array_equal(total.astype(np.float32), vector)
