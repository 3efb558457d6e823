// Vectors as wide as the processor's, and bfloat16, for all C++ of this package.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __FMA__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Unaligned = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

namespace {

// a b + c, rounded once where the processor can: told, or a compiler would here and there only, and bits would differ.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__ARM_FEATURE_FMA)
  for (int lane = 0; lane < LANES; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#else
  return a * b + c;
#endif
}

// The same number in all lanes; from memory, without the addition that a sum with zeros would be.
inline Floats broadcast(float value) {
#if defined(__AVX512F__)
  return Floats(_mm512_set1_ps(value));
#elif defined(__FMA__)
  return Floats(_mm256_set1_ps(value));
#else
  return Floats{} + value;
#endif
}

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
