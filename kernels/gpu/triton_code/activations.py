"""The activations of experts and their derivatives in fp32, as device functions.

``silu``, ``gelu`` (erf), ``gelu_pytorch_tanh``, ``relu`` and ``relu2`` (Primer, https://arxiv.org/abs/2109.08668);
``none`` is a product's own value.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A constant stands to the right of a tensor: on its left, the interpreter makes a constant of the product.
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(value):
    # exp of a negative number cannot overflow
    small = tl.exp(-2.0 * tl.abs(value))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(value < 0, -size, size)


@triton.jit
def activation(value, ACTIVATION: tl.constexpr):
    """``f(value)`` in fp32."""
    if ACTIVATION == "silu":
        result = value * tl.sigmoid(value)
    elif ACTIVATION == "gelu":
        result = 0.5 * value * (1.0 + tl.erf(value * _SQRT_HALF))
    elif ACTIVATION == "gelu_pytorch_tanh":
        result = 0.5 * value * (1.0 + _tanh((value + value * value * value * _CUBIC) * _SQRT_2_OVER_PI))
    elif ACTIVATION == "relu":
        result = tl.maximum(value, 0.0)
    elif ACTIVATION == "none":
        result = value
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(value, 0.0)
        result = positive * positive
    return result


@triton.jit
def activation_slope(value, ACTIVATION: tl.constexpr):
    """``f'(value)`` in fp32; 0 at 0 for ReLU, as in torch."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(value)
        result = share * (1.0 + value * (1.0 - share))
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * value * value) * _INVERSE_SQRT_TAU
        result = 0.5 * (1.0 + tl.erf(value * _SQRT_HALF)) + value * density
    elif ACTIVATION == "gelu_pytorch_tanh":
        slope = _tanh((value + value * value * value * _CUBIC) * _SQRT_2_OVER_PI)
        inner = (1.0 + value * value * (3.0 * _CUBIC)) * _SQRT_2_OVER_PI
        result = 0.5 * (1.0 + slope) + 0.5 * value * (1.0 - slope * slope) * inner
    elif ACTIVATION == "relu":
        result = tl.where(value > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        result = 2.0 * tl.maximum(value, 0.0)
    return result
