"""Spherical linear interpolation of several vectors, in terms of their inner products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

_PARALLEL = 2.0**-50  # squared sine of the angle below which both formulas give the same to less than fp32's roundoff


def slerp_coefficients(gram: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The numbers ``c`` with which ``sum_j c_j v_j`` is the interpolation of N vectors on the sphere.

    Shoemake, "Animating Rotation with Quaternion Curves" (SIGGRAPH 1985): unit vectors a and b at an angle theta are joined
    by ``(sin((1-t) theta) a + sin(t theta) b) / sin(theta)``. Vectors of other lengths are brought to length 1 for it, and
    the result to ``(1-t) |a| + t |b|``. Several are joined one after another, in their order: vector j at
    ``t = w_j / (w_0 + ... + w_j)``, so that the result is as long as they are in the weighted mean. Where the angle is
    zero or half a turn, or a vector is zero and has none, the step is linear: ``(1-t) a + t b``.

    Args:
        gram: ``[N, N]``, the vectors' inner products, in fp64.
        weights: N positive numbers.

    Returns:
        N coefficients. They are final: their sum is 1 only where it happens to be.
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
