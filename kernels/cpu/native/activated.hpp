// Activations and their slopes, on a vector of fp32 numbers at a time.

#pragma once

#include <cstdint>
#include <limits>

#include "vectors.hpp"

namespace {

using Integers = int32_t __attribute__((vector_size(4 * LANES)));

// e^x within two units in the last place: x = n ln 2 + r, the series of e^r, and n added to the exponent. A NaN stays one. Below
// -87 it is e^-87, which nobody can tell from less beside 1; above 88 it is infinite.
inline Floats exponential(Floats x) {
  const Floats infinite = Floats{} + std::numeric_limits<float>::infinity();
  const Floats bounded = x < -87.0f ? Floats{} - 87.0f : x > 88.0f ? Floats{} + 88.0f : x;
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is in the low bits
  const Floats shifted = bounded * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first with few bits
  Floats series = Floats{} + 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r * r + r + 1.0f;
  const Integers power = reinterpret_cast<Integers>(shifted) << 23;
  return x > 88.0f ? infinite : reinterpret_cast<Floats>(reinterpret_cast<Integers>(series) + power);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline Floats positive(Floats z) { return z < 0.0f ? Floats{} : z; }

enum Activation { SILU, GELU_TANH = 2, RELU, RELU2 };

struct Value {
  Floats value, slope;
};

template <int kind>
inline Value activated(Floats z) {
  if constexpr (kind == SILU) {
    const Floats s = sigmoid(z);
    return {z * s, s + z * s * (1.0f - s)};
  } else if constexpr (kind == GELU_TANH) {  // 0.5 (1 + tanh(y)) is the sigmoid of 2y
    const Floats s = sigmoid(1.59576912f * (z + 0.044715f * z * z * z));
    return {z * s, s + z * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * z * z)};
  } else if constexpr (kind == RELU) {
    return {positive(z), z > 0.0f ? Floats{} + 1.0f : Floats{}};
  } else {
    return {positive(z) * positive(z), 2.0f * positive(z)};
  }
}

}  // namespace
