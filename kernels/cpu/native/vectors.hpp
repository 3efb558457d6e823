// Vectors as wide as the processor's, and bfloat16, for all C++ of this package.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Unaligned = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float widened(float value) { return value; }

inline float widened(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float made;
  std::memcpy(&made, &bits, sizeof made);
  return made;
}

inline void store(float value, float* at) { *at = value; }

inline void store(float value, bfloat16* at) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  at->bits = std::isnan(value) ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
