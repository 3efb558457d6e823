"""Interpolates several vectors on the sphere, given only their inner products."""

from __future__ import annotations

import math
from collections.abc import Sequence

_PARALLEL = 2.0**-50  # squared sine of the angle below which both formulas give the same to less than fp32's roundoff


def slerp_coefficients(gram: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Return the coefficients ``c`` with which ``sum_j c_j v_j`` is the spherical interpolation of N vectors.

    Shoemake, "Animating Rotation with Quaternion Curves" (SIGGRAPH 1985): unit vectors a and b at an angle theta are joined
    by ``(sin((1-t) theta) a + sin(t theta) b) / sin(theta)``. Vectors of other lengths are scaled to length 1 for this, and
    the result to ``(1-t) |a| + t |b|``. Several vectors are joined one after another, in their order, vector j at
    ``t = w_j / (w_0 + ... + w_j)``, so that the result's length is the weighted mean of their lengths. Where the angle is
    zero or half a turn, or a vector is zero, the step is linear: ``(1-t) a + t b``.

    Args:
        gram: ``[N, N]``, the vectors' inner products, in fp64.
        weights: N positive numbers.

    Returns:
        N coefficients, to be used as they are: they need not sum to 1.
    """
    joined, total = [1.0], weights[0]
    for j in range(1, len(weights)):
        total += weights[j]
        t = weights[j] / total
        dot = sum(c * gram[i][j] for i, c in enumerate(joined))
        square = sum(c * d * gram[i][k] for i, c in enumerate(joined) for k, d in enumerate(joined))
        length, other = math.sqrt(max(square, 0.0)), math.sqrt(gram[j][j])
        cosine = dot / (length * other) if length and other else 1.0
        if 1 - cosine * cosine < _PARALLEL:
            first, second = 1 - t, t
        else:
            angle, wanted = math.acos(cosine), (1 - t) * length + t * other
            first = math.sin((1 - t) * angle) / math.sin(angle) * wanted / length
            second = math.sin(t * angle) / math.sin(angle) * wanted / other
        joined = [*(first * c for c in joined), second]
    return joined
