// A few rows through experts on a CPU, for all C++ that does so: an expert's weights are read from memory once, whatever number of
// rows it has.
//
// Every dot product is summed in the same order whatever the number of rows and threads, so that a token's output does not
// depend on the tokens beside it. T tokens, K experts per token, S = T K slots, H hidden, I width; n rows of an expert.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "vectors.hpp"

namespace {

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // products: fewer are not worth waking another thread

using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Floats lanes(const float* at) { return *reinterpret_cast<const Unaligned*>(at); }

inline Floats lanes(const bfloat16* at) {
  return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16);
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

// One expert's weights: gate (null without one) and up have a row [H] per neuron, `step` numbers apart; down is [H, I].
template <class Weight>
struct Matrices {
  const Weight *gate, *up, *down;
  int64_t width, step;
};

template <class Weight>
struct Expert {
  Matrices<Weight> weights;
  int64_t first, rows;  // its slots are order[first .. first + rows)
  int64_t h;            // where its activations [n, I] start
};

template <class Weight>
struct Work {
  int64_t hidden, top_k;
  int activation;
  const float* inputs;  // [T, H]
  std::vector<Expert<Weight>> experts;
  std::vector<int64_t> order;        // slots by expert
  std::unique_ptr<float[]> h, made;  // [n, I] of every expert, and [S, H]: h in the order of experts, made in that of slots
};

// The activation of a neuron, for N rows of an expert.
template <int N, class Weight>
inline void neuron(const Work<Weight>& work, const Expert<Weight>& expert, int64_t at, int64_t row) {
  const Matrices<Weight>& weights = expert.weights;
  const float* inputs[N];
  for (int n = 0; n < N; ++n)
    inputs[n] = work.inputs + work.order[expert.first + row + n] / work.top_k * work.hidden;
  float* h = work.h.get() + expert.h + row * weights.width + at;
  const Weight* up = weights.up + at * weights.step;
  if (weights.gate) {
    const Weight* const rows[2] = {weights.gate + at * weights.step, up};
    float z[2][N];
    dots<2, N>(rows, inputs, work.hidden, z);
    for (int n = 0; n < N; ++n) h[n * weights.width] = activated(work.activation, z[0][n]) * z[1][n];
  } else {
    const Weight* const rows[1] = {up};
    float z[1][N];
    dots<1, N>(rows, inputs, work.hidden, z);
    for (int n = 0; n < N; ++n) h[n * weights.width] = activated(work.activation, z[0][n]);
  }
}

// An element of the output of N rows of an expert.
template <int N, class Weight>
inline void output(const Work<Weight>& work, const Expert<Weight>& expert, int64_t at, int64_t row) {
  const int64_t width = expert.weights.width;
  const float* inputs[N];
  for (int n = 0; n < N; ++n) inputs[n] = work.h.get() + expert.h + (row + n) * width;
  const Weight* const rows[1] = {expert.weights.down + at * width};
  float made[1][N];
  dots<1, N>(rows, inputs, width, made);
  for (int n = 0; n < N; ++n) work.made[work.order[expert.first + row + n] * work.hidden + at] = made[0][n];
}

enum class Part { UP, DOWN };

template <Part part, int N, class Weight>
inline void some_rows(const Work<Weight>& work, const Expert<Weight>& expert, int64_t at, int64_t row) {
  if constexpr (part == Part::UP) neuron<N>(work, expert, at, row);
  else output<N>(work, expert, at, row);
}

template <Part part, class Weight>
inline void all_rows(const Work<Weight>& work, const Expert<Weight>& expert, int64_t at) {
  int64_t row = 0;
  for (; row + 4 <= expert.rows; row += 4) some_rows<part, 4>(work, expert, at, row);
  if (row + 2 <= expert.rows) {
    some_rows<part, 2>(work, expert, at, row);
    row += 2;
  }
  if (row < expert.rows) some_rows<part, 1>(work, expert, at, row);
}

// What thread `thread` of `threads` has to do of the neurons, or elements of the output, of every expert: products in equal shares.
template <Part part, class Weight>
void share(const Work<Weight>& work, int64_t thread, int64_t threads) {
  int64_t all = 0;
  for (const Expert<Weight>& expert : work.experts) all += expert.weights.width * work.hidden;
  const int64_t first = all * thread / threads, last = all * (thread + 1) / threads;
  int64_t start = 0;  // of the expert
  for (const Expert<Weight>& expert : work.experts) {
    const int64_t width = expert.weights.width;
    const int64_t size = part == Part::UP ? width : work.hidden, each = part == Part::UP ? work.hidden : width;
    const auto place = [&](int64_t products) { return std::clamp<int64_t>((products - start + each - 1) / each, 0, size); };
    int64_t at = first <= start ? 0 : place(first);
    const int64_t end = last <= start ? 0 : place(last);
    // One row of a matrix after the other, as they lie in memory: with four at a time, a processor fetches ahead so much worse that it
    // takes a third longer in fp32, and almost twice as long in bfloat16.
    for (; at < end; ++at) all_rows<part>(work, expert, at);
    start += width * work.hidden;
  }
}

template <class Weight>
void combine(const Work<Weight>& work, const int64_t* ids, const float* scores, int64_t num_experts, Weight* out,
             int64_t first, int64_t last, int64_t tokens) {
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t element = first; element < last; ++element) {
      float total = 0;
      for (int64_t slot = token * work.top_k; slot < (token + 1) * work.top_k; ++slot)
        if (ids[slot] < num_experts)
          total = std::fma(scores ? scores[slot] : 1.0f, work.made[slot * work.hidden + element], total);
      store(total, out + token * work.hidden + element);
    }
}

// Tokens [T, H] as floats: themselves, or in `room`.
inline const float* floats(const float* x, int64_t, std::unique_ptr<float[]>&) { return x; }

inline const float* floats(const bfloat16* x, int64_t count, std::unique_ptr<float[]>& room) {
  room.reset(new float[count]);
  for (int64_t i = 0; i < count; ++i) room[i] = widened(x[i]);
  return room.get();
}

// The output [T, H] of tokens [T, H] for ids [T, K], none negative, of which those of num_experts and more have no expert;
// scores are [T, K], or null: all 1. `pick` gives the weights of an expert by its id.
template <class Weight, class Pick>
void run_experts(int64_t hidden, int64_t top_k, int activation, const float* inputs, const int64_t* ids,
                 const float* scores, Weight* out, int64_t tokens, int64_t num_experts, int64_t most_threads, Pick pick) {
  Work<Weight> work{hidden, top_k, activation, inputs, {}, {}, nullptr, nullptr};
  for (int64_t slot = 0; slot < tokens * top_k; ++slot)
    if (ids[slot] < num_experts) work.order.push_back(slot);
  std::stable_sort(work.order.begin(), work.order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  int64_t last = -1, activations = 0;
  for (int64_t place = 0; place < static_cast<int64_t>(work.order.size()); ++place) {
    const int64_t id = ids[work.order[place]];
    if (id != last) work.experts.push_back({pick(id), place, 0, activations});
    last = id;
    ++work.experts.back().rows;
    activations += work.experts.back().weights.width;
  }
  work.h.reset(new float[activations]);
  work.made.reset(new float[tokens * top_k * hidden]);
  const int threads = static_cast<int>(std::min(most_threads, activations * hidden / WORTH_A_THREAD + 1));
  const auto stages = [&](int64_t thread, int64_t count, auto wait) {
    share<Part::UP>(work, thread, count);
    wait();
    share<Part::DOWN>(work, thread, count);
    wait();
    combine(work, ids, scores, num_experts, out, hidden * thread / count, hidden * (thread + 1) / count, tokens);
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    stages(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
    return;
  }
#endif
  stages(0, 1, [] {});
}

}  // namespace
