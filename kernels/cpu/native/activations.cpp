// Experts' activations on a CPU, forward and backward, in one pass over memory each: torch's own operations read and write it
// five times as often. Every element is computed alike wherever it lies, and a row's sum in one order, whatever the number of threads.
// n rows, I width; z [n, 2I] holds the gate's columns before the up projection's, or [n, I] without a gate.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activated.hpp"

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 15;  // elements: fewer are not worth waking another thread

// Where less than a vector is left, zeros stand for the rest, and only what is there is written.
inline Floats load(const float* at, int64_t count) {
  if (count >= LANES) return *reinterpret_cast<const Unaligned*>(at);
  Floats found = {};
  std::memcpy(&found, at, 4 * count);
  return found;
}

inline void store(Floats value, float* at, int64_t count) {
  if (count >= LANES) *reinterpret_cast<Unaligned*>(at) = value;
  else std::memcpy(at, &value, 4 * count);
}

template <int kind, bool gated>
void forward_row(const float* z, int64_t width, float* h) {
  for (int64_t i = 0; i < width; i += LANES) {
    Floats value = activated<kind>(load(z + i, width - i)).value;
    if constexpr (gated) value *= load(z + width + i, width - i);
    store(value, h + i, width - i);
  }
}

// Returns the row's dh . h, unscaled.
template <int kind, bool gated>
float backward_row(const float* dh, const float* z, float scale, int64_t width, float* h, float* dz) {
  Floats sums = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const Value gate = activated<kind>(load(z + i, width - i));
    const Floats slope = load(dh + i, width - i);
    Floats value = gate.value, inner = slope * gate.slope;
    if constexpr (gated) {
      const Floats up = load(z + width + i, width - i);
      store(slope * gate.value * scale, dz + width + i, width - i);
      value *= up;
      inner *= up;
    }
    sums += slope * value;
    store(value * scale, h + i, width - i);
    store(inner * scale, dz + i, width - i);
  }
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
  return total;
}

template <class Row>
void all_rows(int64_t rows, int64_t width, int64_t most_threads, Row row) {
  const int threads = static_cast<int>(std::min(most_threads, rows * width / WORTH_A_THREAD + 1));
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; ++n) row(n);
    return;
  }
#endif
  for (int64_t n = 0; n < rows; ++n) row(n);
}

template <int kind, bool gated>
void run(const float* z, const float* dh, const float* scale, int64_t rows, int64_t width, float* h, float* dz,
         float* products, int64_t threads) {
  const int64_t columns = gated ? 2 * width : width;
  all_rows(rows, width, threads, [&](int64_t n) {
    if (dh == nullptr) return forward_row<kind, gated>(z + n * columns, width, h + n * width);
    const float product = backward_row<kind, gated>(dh + n * width, z + n * columns, scale ? scale[n] : 1.0f, width,
                                                    h + n * width, dz + n * columns);
    if (products) products[n] = product;
  });
}

template <int kind>
void run(bool gated, const float* z, const float* dh, const float* scale, int64_t rows, int64_t width, float* h,
         float* dz, float* products, int64_t threads) {
  if (gated) run<kind, true>(z, dh, scale, rows, width, h, dz, products, threads);
  else run<kind, false>(z, dh, scale, rows, width, h, dz, products, threads);
}

}  // namespace

// Without dh: h [n, I] of z. With dh [n, I], the gradient of h as if no row were scaled: h and the gradient dz of z, both times the
// row's scale (null: 1), and every row's dh . h without it, unless products is null. Everything is contiguous. Returns 1 for
// an activation that is not here.
extern "C" int upcycle_activations(int activation, int gated, const float* z, const float* dh, const float* scale,
                                   int64_t rows, int64_t width, float* h, float* dz, float* products, int threads) {
  switch (activation) {
    case SILU: run<SILU>(gated, z, dh, scale, rows, width, h, dz, products, threads); return 0;
    case GELU_TANH: run<GELU_TANH>(gated, z, dh, scale, rows, width, h, dz, products, threads); return 0;
    case RELU: run<RELU>(gated, z, dh, scale, rows, width, h, dz, products, threads); return 0;
    case RELU2: run<RELU2>(gated, z, dh, scale, rows, width, h, dz, products, threads); return 0;
    default: return 1;
  }
}
