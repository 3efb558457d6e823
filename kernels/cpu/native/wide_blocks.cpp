// Many tokens through a whole sparse block of fp32 weights: router, softmax, the K best experts, and a shared expert, in one call.
// Tokens lie side by side in a processor's vectors, and weights are read as they are stored: an expert has too few tokens for its
// weights to be packed first. T tokens, K experts per token, E experts, H hidden, I width of an expert.
//
// A panel holds WIDE tokens: [depth, WIDE], zeros behind the last one.

#include <memory>

#include "activated.hpp"
#include "routing.hpp"

namespace {

constexpr int64_t WIDE = 2 * LANES;
constexpr int ROWS = LANES == 16 ? 12 : 6;  // of weights that are multiplied at a time, as many as there are registers for
constexpr int NEAR = 3;  // that are reached from one address
constexpr int PAIRS = ROWS / 2;

using Aligned = float __attribute__((vector_size(4 * LANES), aligned(64), may_alias));

inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

struct Expert {
  const float *gate, *up, *down;  // [I, H] twice, [H, I]
  int64_t width, first, count;    // its rows are [first, first + count)
  const float* x;                 // panels [H, WIDE]
  float* h;                       // panels [I, WIDE]

  int64_t panels() const { return whole(count, WIDE) / WIDE; }
};

struct Pass {
  int64_t hidden;
  const int32_t* token;  // of every row
  const float* score;    // of every row
  float* out;            // [T, H]
};

// sums[b * N + n] = row n behind bases[b] . panel: few addresses that rows are reached from leave registers for the sums. With `ahead`,
// the rows that lie so far behind these are asked for meanwhile: each row is in a page of memory that no processor foresees.
template <int B, int N>
inline void multiply(const float* const (&bases)[B], int64_t stride, const float* panel, int64_t depth, int64_t ahead,
                     Floats (&sums)[B * N][2]) {
  constexpr int64_t LINE = 16;  // numbers that come from memory together
  const float* at[B];
  for (int b = 0; b < B; ++b) at[b] = bases[b];
  for (int r = 0; r < B * N; ++r) sums[r][0] = sums[r][1] = Floats{};
  for (int64_t begin = 0; begin < depth; begin += LINE) {
    if (ahead)
      for (int b = 0; b < B; ++b)
        for (int n = 0; n < N; ++n) __builtin_prefetch(at[b] + n * stride + ahead, 0, 2);
    const int64_t end = std::min(depth, begin + LINE);
    for (int64_t k = begin; k < end; ++k, panel += WIDE) {
      const Floats one = *reinterpret_cast<const Aligned*>(panel), other = *reinterpret_cast<const Aligned*>(panel + LANES);
      for (int b = 0; b < B; ++b) {
        for (int n = 0; n < N; ++n) {
          const Floats weight = broadcast(at[b][n * stride]);
          sums[b * N + n][0] = fused(weight, one, sums[b * N + n][0]);
          sums[b * N + n][1] = fused(weight, other, sums[b * N + n][1]);
        }
        ++at[b];
      }
    }
  }
}

inline void put(Floats value, float* at) { *reinterpret_cast<Aligned*>(at) = value; }

// Rows [begin, end) of matrix [., depth] times panels, into panels.
template <int B, int N>
void some_rows(const float* matrix, int64_t row, int64_t depth, const float* from, int64_t panels, float* to, int64_t rows) {
  const float* bases[B];
  for (int b = 0; b < B; ++b) bases[b] = matrix + (row + b * N) * depth;
  for (int64_t panel = 0; panel < panels; ++panel) {
    Floats sums[B * N][2];
    multiply<B, N>(bases, depth, from + panel * depth * WIDE, depth, panel ? 0 : B * N * depth, sums);
    float* at = to + (panel * rows + row) * WIDE;
    for (int r = 0; r < B * N; ++r) {
      put(sums[r][0], at + r * WIDE);
      put(sums[r][1], at + r * WIDE + LANES);
    }
  }
}

// `rows`: how many the panels that are written have.
void all_rows(const float* matrix, int64_t begin, int64_t end, int64_t depth, const float* from, int64_t panels, float* to, int64_t rows) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) some_rows<ROWS / NEAR, NEAR>(matrix, row, depth, from, panels, to, rows);
  for (; row < end; ++row) some_rows<1, 1>(matrix, row, depth, from, panels, to, rows);
}

template <int kind, int B, int N>
void some_neurons(const Expert& expert, int64_t neuron, int64_t hidden) {
  constexpr int P = B * N;
  const float* bases[2 * B];
  for (int b = 0; b < B; ++b) {
    bases[b] = expert.gate + (neuron + b * N) * hidden;
    bases[B + b] = expert.up + (neuron + b * N) * hidden;
  }
  for (int64_t panel = 0; panel < expert.panels(); ++panel) {
    Floats sums[2 * P][2];
    multiply<2 * B, N>(bases, hidden, expert.x + panel * hidden * WIDE, hidden, panel ? 0 : P * hidden, sums);
    float* h = expert.h + (panel * expert.width + neuron) * WIDE;
    for (int p = 0; p < P; ++p)
      for (int half = 0; half < 2; ++half)
        put(activated<kind>(sums[p][half]).value * sums[P + p][half], h + p * WIDE + half * LANES);
  }
}

template <int kind>
void neurons(const Expert& expert, int64_t begin, int64_t end, int64_t hidden) {
  int64_t neuron = begin;
  for (; neuron + PAIRS <= end; neuron += PAIRS) some_neurons<kind, PAIRS / NEAR, NEAR>(expert, neuron, hidden);
  for (; neuron < end; ++neuron) some_neurons<kind, 1, 1>(expert, neuron, hidden);
}

// Exchanges rows and lanes.
inline void turn(Floats (&rows)[LANES]) {
#if defined(__AVX512F__)
  __m512 s[16], t[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(__m512(rows[i]), __m512(rows[i + 1]));
    s[i + 1] = _mm512_unpackhi_ps(__m512(rows[i]), __m512(rows[i + 1]));
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(s[i + j]), high = _mm512_castps_pd(s[i + 2 + j]);
      t[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      t[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), odd = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), odd2 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    rows[i] = Floats(_mm512_shuffle_f32x4(even, even2, 0x88));
    rows[i + 8] = Floats(_mm512_shuffle_f32x4(even, even2, 0xdd));
    rows[i + 4] = Floats(_mm512_shuffle_f32x4(odd, odd2, 0x88));
    rows[i + 12] = Floats(_mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
#elif defined(__AVX__)
  __m256 s[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(__m256(rows[i]), __m256(rows[i + 1]));
    s[i + 1] = _mm256_unpackhi_ps(__m256(rows[i]), __m256(rows[i + 1]));
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(s[i + j]), high = _mm256_castps_pd(s[i + 2 + j]);
      t[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      t[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i) {
    rows[i] = Floats(_mm256_permute2f128_ps(t[i], t[i + 4], 0x20));
    rows[i + 4] = Floats(_mm256_permute2f128_ps(t[i], t[i + 4], 0x31));
  }
#else
  Floats turned[LANES];
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j) turned[j][i] = rows[i][j];
  for (int i = 0; i < LANES; ++i) rows[i] = turned[i];
#endif
}

inline Floats some(const float* at, int64_t count) {
  if (count >= LANES) return *reinterpret_cast<const Unaligned*>(at);
  Floats found = {};
  for (int64_t lane = 0; lane < count; ++lane) found[lane] = at[lane];
  return found;
}

// A panel of `count` tokens x [., hidden]; without `token`, those from `first` on.
void pack(const float* x, const int32_t* token, int64_t first, int64_t count, int64_t hidden, float* panel) {
  for (int64_t side = 0; side < WIDE; side += LANES)
    for (int64_t k = 0; k < hidden; k += LANES) {
      Floats rows[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        const int64_t row = side + i;
        rows[i] = row < count ? some(x + (token ? token[row] : first + row) * hidden + k, hidden - k) : Floats{};
      }
      turn(rows);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, hidden - k); ++i) put(rows[i], panel + (k + i) * WIDE + side);
    }
}

// The columns [begin, end) of the output, of all experts, in their order.
void outward(const Pass& pass, const std::vector<Expert>& experts, int64_t tokens, int64_t begin, int64_t end) {
  thread_local std::unique_ptr<float[]> room;
  thread_local int64_t size = 0;
  const int64_t columns = end - begin, needed = whole(columns, LANES) * WIDE + 16;
  if (size < needed) {
    room.reset(new float[needed]);
    size = needed;
  }
  float* made = reinterpret_cast<float*>(whole(reinterpret_cast<int64_t>(room.get()), 64));
  for (int64_t token = 0; token < tokens; ++token) std::fill(pass.out + token * pass.hidden + begin, pass.out + token * pass.hidden + end, 0.0f);
  for (const Expert& expert : experts)
    for (int64_t panel = 0; panel < expert.panels(); ++panel) {
      const float* down = expert.down + begin * expert.width;
      all_rows(down, 0, columns, expert.width, expert.h + panel * expert.width * WIDE, 1, made, columns);
      for (int64_t side = 0; side < WIDE; side += LANES) {
        const int64_t row = expert.first + panel * WIDE + side;
        const int64_t count = std::min<int64_t>(LANES, expert.first + expert.count - row);
        for (int64_t column = 0; count > 0 && column < columns; column += LANES) {
          const int64_t wide = std::min<int64_t>(LANES, columns - column);
          Floats rows[LANES];
          for (int64_t i = 0; i < LANES; ++i)
            rows[i] = i < wide ? Floats(*reinterpret_cast<const Aligned*>(made + (column + i) * WIDE + side)) : Floats{};
          turn(rows);
          for (int64_t i = 0; i < count; ++i) {
            float* to = pass.out + pass.token[row + i] * pass.hidden + begin + column;
            const Floats sum = fused(broadcast(pass.score[row + i]), rows[i], some(to, wide));
            if (wide == LANES) *reinterpret_cast<Unaligned*>(to) = sum;
            else for (int64_t lane = 0; lane < wide; ++lane) to[lane] = sum[lane];
          }
        }
      }
    }
}

struct Task {
  int64_t item, begin, end;
};

template <class Run>
void all(const std::vector<Task>& tasks, int threads, Run run) {
#ifdef _OPENMP
  if (threads > 1 && tasks.size() > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) run(tasks[i]);
    return;
  }
#endif
  for (const Task& task : tasks) run(task);
}

// [0, count) in parts of `part`.
void divide(std::vector<Task>& tasks, int64_t item, int64_t count, int64_t part) {
  for (int64_t at = 0; at < count; at += part) tasks.push_back({item, at, std::min(count, at + part)});
}

struct Room {
  char* at;

  template <class Number>
  Number* take(int64_t count) {
    Number* found = reinterpret_cast<Number*>(at);
    at += whole(count * sizeof(Number), 64);
    return found;
  }
};

template <int kind>
void run(const Block& layer, const float* x, float* out, int64_t tokens, Room room, int threads) {
  const int64_t hidden = layer.hidden, count = layer.num_experts, shared = layer.shared_up ? 1 : 0, slots = layer.top_k + shared;
  const int64_t rows = tokens * slots, padded = whole(tokens, WIDE), panels = padded / WIDE;
  float* inputs = room.take<float>(padded * hidden);
  float* logits = room.take<float>(padded * (count + 1));  // by panels, as everything
  float* values = room.take<float>(count);
  float* scores = room.take<float>(rows);
  float* row_scores = room.take<float>(rows);
  int32_t* ids = room.take<int32_t>(rows);
  int32_t* row_tokens = room.take<int32_t>(rows);
  std::vector<Task> tasks;
  divide(tasks, 0, panels, 1);
  all(tasks, threads, [&](const Task& task) {
    const int64_t first = task.begin * WIDE;
    float* panel = inputs + first * hidden;
    pack(x, nullptr, first, tokens - first, hidden, panel);
    float* made = logits + first * (count + 1);
    all_rows(static_cast<const float*>(layer.router), 0, count, hidden, panel, 1, made, count + 1);
    if (layer.shared_switch) all_rows(static_cast<const float*>(layer.shared_switch), 0, 1, hidden, panel, 1, made + count * WIDE, 1);
  });
  std::vector<std::pair<float, int64_t>> best;
  for (int64_t token = 0; token < tokens; ++token) {
    const float* made = logits + token / WIDE * WIDE * (count + 1) + token % WIDE;
    for (int64_t i = 0; i < count; ++i) values[i] = made[i * WIDE];
    choose<float>(layer, values, layer.shared_switch ? made[count * WIDE] : 0, best, ids + token * slots, scores + token * slots);
  }
  std::vector<int64_t> ends(count + 2);  // of every expert's rows, moved by one
  for (int64_t slot = 0; slot < rows; ++slot) ++ends[ids[slot] + 1];
  for (int64_t id = 0; id <= count; ++id) ends[id + 1] += ends[id];
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  for (int64_t slot = 0; slot < rows; ++slot) {
    const int64_t row = next[ids[slot]]++;
    row_tokens[row] = static_cast<int32_t>(slot / slots);
    row_scores[row] = scores[slot];
  }
  std::vector<Expert> experts;
  tasks.clear();
  const int64_t matrix = layer.width * hidden;
  for (int64_t id = 0; id < count + shared; ++id) {
    Expert expert;
    expert.first = ends[id];
    expert.count = ends[id + 1] - ends[id];
    if (!expert.count) continue;
    if (id == count) {
      expert.gate = static_cast<const float*>(layer.shared_gate);
      expert.up = static_cast<const float*>(layer.shared_up);
      expert.down = static_cast<const float*>(layer.shared_down);
      expert.width = layer.shared_width;
      expert.x = inputs;  // all tokens, in their order
    } else {
      expert.gate = static_cast<const float*>(layer.up) + 2 * id * matrix;
      expert.up = expert.gate + matrix;
      expert.down = static_cast<const float*>(layer.down) + id * matrix;
      expert.width = layer.width;
      expert.x = room.take<float>(expert.panels() * WIDE * hidden);
      divide(tasks, static_cast<int64_t>(experts.size()), expert.panels(), 1);
    }
    expert.h = room.take<float>(expert.panels() * WIDE * expert.width);
    experts.push_back(expert);
  }
  all(tasks, threads, [&](const Task& task) {
    const Expert& expert = experts[task.item];
    const int64_t first = task.begin * WIDE;
    pack(x, row_tokens + expert.first + first, 0, expert.count - first, hidden, const_cast<float*>(expert.x) + first * hidden);
  });
  tasks.clear();
  for (size_t i = 0; i < experts.size(); ++i) divide(tasks, static_cast<int64_t>(i), experts[i].width, 16 * PAIRS);
  all(tasks, threads, [&](const Task& task) { neurons<kind>(experts[task.item], task.begin, task.end, hidden); });
  tasks.clear();
  divide(tasks, 0, hidden, threads > 1 ? whole(whole(hidden, threads) / threads, ROWS * LANES) : hidden);
  const Pass pass{hidden, row_tokens, row_scores, out};
  all(tasks, threads, [&](const Task& task) { outward(pass, experts, tokens, task.begin, task.end); });
}

}  // namespace

// The output [T, H] of a block for contiguous x [T, H]. `memory` is as many_tokens.py counts it, and aligned to 64 bytes. Returns 1 for an
// activation that is not here.
extern "C" int upcycle_wide_blocks(const void* block, const void* x, void* out, int64_t tokens, void* memory, int threads) {
  const Block& layer = *static_cast<const Block*>(block);
  const float* inputs = static_cast<const float*>(x);
  const Room room{static_cast<char*>(memory)};
  switch (layer.activation) {
    case SILU: run<SILU>(layer, inputs, static_cast<float*>(out), tokens, room, threads); return 0;
    case GELU_TANH: run<GELU_TANH>(layer, inputs, static_cast<float*>(out), tokens, room, threads); return 0;
    case RELU: run<RELU>(layer, inputs, static_cast<float*>(out), tokens, room, threads); return 0;
    case RELU2: run<RELU2>(layer, inputs, static_cast<float*>(out), tokens, room, threads); return 0;
    default: return 1;
  }
}
