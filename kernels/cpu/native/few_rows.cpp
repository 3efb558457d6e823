// A few tokens through their experts on a CPU: the chosen experts' weights are read from memory once, whatever number of rows they have.
//
// Every dot product is summed in the same order whatever the number of rows and threads, so that a token's output does not
// depend on the tokens beside it. T tokens, K experts per token, S = T K slots, H hidden, I width; n rows of an expert.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "vectors.hpp"

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // products: fewer are not worth waking another thread

using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bfloat16 {
  uint16_t bits;
};

inline Floats lanes(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }

inline Floats lanes(const bfloat16* at) {
  return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16);
}

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

// The first `count` lanes from there, and zeros: what is past the end is not read.
template <class Number>
inline Floats some_lanes(const Number* at, int64_t count) {
  Floats found = {};
  for (int64_t lane = 0; lane < count; ++lane) found[lane] = widened(at[lane]);
  return found;
}

// out[r][n] = weights[r] . inputs[n]
template <int R, int N, class Weight>
inline void dots(const Weight* const (&weights)[R], const float* const* inputs, int64_t length, float (&out)[R][N]) {
  Floats sums[R][N] = {};
  int64_t i = 0;
  for (; i + LANES <= length; i += LANES) {
    Floats x[N];
    for (int n = 0; n < N; ++n) x[n] = lanes(inputs[n] + i);
    for (int r = 0; r < R; ++r) {
      const Floats weight = lanes(weights[r] + i);
      for (int n = 0; n < N; ++n) sums[r][n] = fused(weight, x[n], sums[r][n]);
    }
  }
  if (i < length) {
    Floats x[N];
    for (int n = 0; n < N; ++n) x[n] = some_lanes(inputs[n] + i, length - i);
    for (int r = 0; r < R; ++r) {
      const Floats weight = some_lanes(weights[r] + i, length - i);
      for (int n = 0; n < N; ++n) sums[r][n] = fused(weight, x[n], sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      float total = 0;
      for (int lane = 0; lane < LANES; ++lane) total += sums[r][n][lane];
      out[r][n] = total;
    }
}

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2 };

inline float activated(int kind, float z) {
  switch (kind) {
    case SILU: return z / (1 + std::exp(-z));
    case GELU: return 0.5f * z * (1 + std::erf(z * 0.70710678f));
    case GELU_TANH: return 0.5f * z * (1 + std::tanh(0.79788456f * (z + 0.044715f * z * z * z)));
    case RELU: return z < 0 ? 0 : z;  // a NaN stays one
    default: return z < 0 ? 0 : z * z;
  }
}

struct Layer {
  int64_t hidden, width, top_k;
  int activation;
  bool gated, interleaved;
};

struct Expert {
  int64_t id, first, rows;  // its slots are order[first .. first + rows)
};

struct Work {
  Layer layer;
  std::vector<Expert> experts;
  std::vector<int64_t> order;  // slots by expert
  std::unique_ptr<float[]> inputs, h, made;  // [T, H], [S, I] and [S, H], h in the order of experts, made in that of slots
};

// The activations of P neurons from `neuron` on, for all rows of an expert.
template <int P, int N, class Weight>
inline void neurons(const Work& work, const Weight* up, const Expert& expert, int64_t neuron, int64_t row) {
  const Layer& layer = work.layer;
  const float* inputs[N];
  for (int n = 0; n < N; ++n)
    inputs[n] = work.inputs.get() + work.order[expert.first + row + n] / layer.top_k * layer.hidden;
  float* h = work.h.get() + (expert.first + row) * layer.width + neuron;
  if (layer.gated) {
    const Weight* weights[2 * P];
    for (int p = 0; p < P; ++p) {
      const int64_t gate = layer.interleaved ? 2 * (neuron + p) : neuron + p;
      weights[p] = up + gate * layer.hidden;
      weights[P + p] = up + (gate + (layer.interleaved ? 1 : layer.width)) * layer.hidden;
    }
    float z[2 * P][N];
    dots<2 * P, N>(weights, inputs, layer.hidden, z);
    for (int n = 0; n < N; ++n)
      for (int p = 0; p < P; ++p) h[n * layer.width + p] = activated(layer.activation, z[p][n]) * z[P + p][n];
  } else {
    const Weight* weights[P];
    for (int p = 0; p < P; ++p) weights[p] = up + (neuron + p) * layer.hidden;
    float z[P][N];
    dots<P, N>(weights, inputs, layer.hidden, z);
    for (int n = 0; n < N; ++n)
      for (int p = 0; p < P; ++p) h[n * layer.width + p] = activated(layer.activation, z[p][n]);
  }
}

// R elements of the output of all rows of an expert.
template <int R, int N, class Weight>
inline void outputs(const Work& work, const Weight* down, const Expert& expert, int64_t element, int64_t row) {
  const Layer& layer = work.layer;
  const float* inputs[N];
  for (int n = 0; n < N; ++n) inputs[n] = work.h.get() + (expert.first + row + n) * layer.width;
  const Weight* weights[R];
  for (int r = 0; r < R; ++r) weights[r] = down + (element + r) * layer.width;
  float made[R][N];
  dots<R, N>(weights, inputs, layer.width, made);
  for (int n = 0; n < N; ++n) {
    float* out = work.made.get() + work.order[expert.first + row + n] * layer.hidden + element;
    for (int r = 0; r < R; ++r) out[r] = made[r][n];
  }
}

enum class Part { UP, DOWN };

template <Part part, int P, int N, class Weight>
inline void block(const Work& work, const Weight* matrix, const Expert& expert, int64_t at, int64_t row) {
  if constexpr (part == Part::UP) neurons<P, N>(work, matrix, expert, at, row);
  else outputs<P, N>(work, matrix, expert, at, row);
}

template <Part part, int P, class Weight>
inline void all_rows(const Work& work, const Weight* matrix, const Expert& expert, int64_t at) {
  int64_t row = 0;
  for (; row + 4 <= expert.rows; row += 4) block<part, P, 4>(work, matrix, expert, at, row);
  if (row + 2 <= expert.rows) {
    block<part, P, 2>(work, matrix, expert, at, row);
    row += 2;
  }
  if (row < expert.rows) block<part, P, 1>(work, matrix, expert, at, row);
}

// What thread `thread` of `threads` has to do of `size` neurons, or elements of the output, of every expert.
template <Part part, class Weight>
void share(const Work& work, const Weight* tensor, int64_t thread, int64_t threads) {
  const Layer& layer = work.layer;
  const int64_t size = part == Part::UP ? layer.width : layer.hidden;
  const int64_t matrix = layer.width * layer.hidden * (part == Part::UP && layer.gated ? 2 : 1);
  const int64_t all = static_cast<int64_t>(work.experts.size()) * size;
  const int64_t first = all * thread / threads, last = all * (thread + 1) / threads;
  for (int64_t number = first / size; number * size < last; ++number) {
    const Expert& expert = work.experts[number];
    const Weight* weights = tensor + expert.id * matrix;
    int64_t at = std::max<int64_t>(0, first - number * size);
    const int64_t end = std::min(size, last - number * size);
    if (expert.rows == 1)  // as many sums at a time as of two rows and more
      for (; at + 4 <= end; at += 4) block<part, 4, 1>(work, weights, expert, at, 0);
    for (; at + 2 <= end; at += 2) all_rows<part, 2>(work, weights, expert, at);
    for (; at < end; ++at) all_rows<part, 1>(work, weights, expert, at);
  }
}

template <class Weight>
void combine(const Work& work, const int64_t* ids, const float* scores, int64_t num_experts, Weight* out, int64_t first,
             int64_t last, int64_t tokens) {
  const Layer& layer = work.layer;
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t element = first; element < last; ++element) {
      float total = 0;
      for (int64_t slot = token * layer.top_k; slot < (token + 1) * layer.top_k; ++slot)
        if (ids[slot] < num_experts)
          total = std::fma(scores ? scores[slot] : 1.0f, work.made[slot * layer.hidden + element], total);
      store(total, out + token * layer.hidden + element);
    }
}

template <class Weight>
int run(const Layer& layer, const Weight* x, const Weight* up, const Weight* down, const int64_t* ids,
        const float* scores, Weight* out, int64_t tokens, int64_t num_experts, int64_t most_threads) {
  const int64_t slots = tokens * layer.top_k;
  Work work{layer, {}, {}, nullptr, nullptr, nullptr};
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (ids[slot] < 0) return 1;
    if (ids[slot] >= num_experts) continue;
    work.order.push_back(slot);
  }
  std::stable_sort(work.order.begin(), work.order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  for (int64_t place = 0; place < static_cast<int64_t>(work.order.size()); ++place) {
    const int64_t id = ids[work.order[place]];
    if (work.experts.empty() || work.experts.back().id != id) work.experts.push_back({id, place, 0});
    ++work.experts.back().rows;
  }
  work.inputs.reset(new float[tokens * layer.hidden]);
  for (int64_t i = 0; i < tokens * layer.hidden; ++i) work.inputs[i] = widened(x[i]);
  work.h.reset(new float[work.order.size() * layer.width]);
  work.made.reset(new float[slots * layer.hidden]);
  const int64_t products = static_cast<int64_t>(work.order.size()) * layer.width * layer.hidden;
  const int threads = static_cast<int>(std::min(most_threads, products / WORTH_A_THREAD + 1));
  const auto stages = [&](int64_t thread, int64_t count, auto wait) {
    share<Part::UP>(work, up, thread, count);
    wait();
    share<Part::DOWN>(work, down, thread, count);
    wait();
    combine(work, ids, scores, num_experts, out, layer.hidden * thread / count, layer.hidden * (thread + 1) / count, tokens);
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    stages(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
    return 0;
  }
#endif
  stages(0, 1, [] {});
  return 0;
}

}  // namespace

// The output [T, H] of experts without biases, up [E, 2I or I, H] and down [E, H, I], for ids [T, K]; ids of E and more have no
// expert. Scores [T, K] in fp32, or null: all 1. Kind: 0 for fp32, 1 for bfloat16 x, weights and output; all are contiguous.
// Returns 0, or 1 for a negative id; nothing was written then. A score that is not finite makes its token's output so.
extern "C" int upcycle_few_rows(int kind, const void* x, const void* up, const void* down, const int64_t* ids,
                                const float* scores, void* out, int64_t tokens, int64_t top_k, int64_t num_experts,
                                int64_t hidden, int64_t width, int activation, int gated, int interleaved, int threads) {
  const Layer layer{hidden, width, top_k, activation, gated != 0, interleaved != 0};
  if (kind == 0)
    return run(layer, static_cast<const float*>(x), static_cast<const float*>(up), static_cast<const float*>(down), ids,
               scores, static_cast<float*>(out), tokens, num_experts, threads);
  return run(layer, static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(up), static_cast<const bfloat16*>(down),
             ids, scores, static_cast<bfloat16*>(out), tokens, num_experts, threads);
}
