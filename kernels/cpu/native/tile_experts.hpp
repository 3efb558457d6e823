// A whole pass of tokens through small bf16 experts in the processor's tiles (AMX). What lies between its two products stays in the cache:
// pre-activations go from the tiles' sums through the activation into the other product's operand, and its sums into the tokens' output.
// Sums are fp32. Every token's are added in the order of the experts, whatever the number of threads.
// T tokens, R rows sorted by expert, H hidden, I width of an expert; z [n, 2I] of an expert holds the gate's columns before the up
// projection's, or [n, I] without a gate.

#pragma once

#include "tiles.hpp"

#ifdef UPCYCLE_TILES
#include "activated.hpp"

namespace {

struct Expert {
  const uint16_t *gate, *up, *down;  // without a gate, only up
  int64_t up_stride, down_stride;    // of the dimension that is not contiguous
  int64_t first, count, width;       // its rows are [first, first + count)
  uint16_t *h, *z;                   // h [n + 16, I], bf16, I rounded up to a whole DEPTH; z may be null: it is not kept
};

struct Pass {
  const uint16_t* x;
  int64_t x_stride, hidden;
  const int32_t* token;  // of every row
  const float* score;    // of every row; null: all 1
  int64_t tokens;
  float* sums;    // [T, H]
  uint16_t* out;  // [T, H], bf16
};

// Bytes of sums that are added to at a time: reading h again for other columns takes longer than a larger cache.
constexpr int64_t MOST_CACHED = 1 << 24;

inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

inline __m256i activated_halves(Floats value) { return halved(reinterpret_cast<__m512>(value)); }

// h of the rows [begin, end) of an expert, zeros behind its width; z, if it is kept.
template <int kind, bool gated, bool summed_inner>
void inner(const Pass& pass, const Expert& expert, int64_t begin, int64_t end) {
  thread_local std::vector<Tile> lefts, rights;
  const int64_t deep = whole(pass.hidden, DEPTH) / DEPTH, blocks = whole(end - begin, SIDE) / SIDE;
  const Operand<uint16_t, true> rows{pass.x, expert.count, pass.hidden, pass.x_stride, pass.token + expert.first};
  using Weights = Operand<uint16_t, summed_inner>;
  const auto weights = [&](const uint16_t* at) -> Weights {
    if constexpr (summed_inner) return {at, expert.width, pass.hidden, expert.up_stride};
    else return {at, pass.hidden, expert.width, expert.up_stride};
  };
  const Weights gate = weights(expert.gate), up = weights(expert.up);
  lefts.resize(blocks * deep);
  rights.resize(CHUNK_COLUMNS / SIDE * deep);
  in_memory_order<false>(blocks, deep, [&](int64_t m, int64_t k) { rows.by_rows(begin + m * SIDE, k * DEPTH, lefts[m * deep + k]); });
  constexpr int64_t parts = gated ? 2 : 1, chunk_neurons = CHUNK_COLUMNS / parts;
  const int64_t columns = parts * expert.width;
  Sums sums[4];
  for (int64_t chunk = 0; chunk < whole(expert.width, DEPTH); chunk += chunk_neurons) {
    const int64_t wide = parts * std::min(chunk_neurons, whole(expert.width, DEPTH) - chunk) / SIDE;  // tiles, an even number
    for (int64_t part = 0; part < parts; ++part)
      in_memory_order<!summed_inner>(wide / parts, deep, [&](int64_t n, int64_t k) {
        (gated && part == 0 ? gate : up).by_words(chunk + n * SIDE, k * DEPTH, rights[(parts * n + part) * deep + k]);
      });
    for (int64_t n = 0; n < wide; n += 2) {
      const Tile* b0 = &rights[n * deep];
      for (int64_t m = 0; m < blocks; m += 2) {
        const bool both = m + 1 < blocks;
        const Tile* a0 = &lefts[m * deep];
        sum_four(a0, both ? a0 + deep : a0, sizeof(Tile), 64, b0, b0 + deep, deep, both, true);
        _tile_stored(0, sums[0].at, 64); _tile_stored(1, sums[1].at, 64);
        if (both) { _tile_stored(2, sums[2].at, 64); _tile_stored(3, sums[3].at, 64); }
        const int64_t row = begin + m * SIDE, rows_here = std::min<int64_t>(both ? 2 * SIDE : SIDE, end - row);
        for (int64_t i = 0; i < rows_here; ++i) {
          const Sums* from = sums + 2 * (i / SIDE);
          const __m512 one = _mm512_load_ps(from[0].at[i % SIDE]), other = _mm512_load_ps(from[1].at[i % SIDE]);
          const int64_t neuron = chunk + n / parts * SIDE;
          uint16_t* h = expert.h + (row + i) * whole(expert.width, DEPTH) + neuron;
          uint16_t* z = expert.z ? expert.z + (row + i) * columns + neuron : nullptr;
          const Floats value = activated<kind>(reinterpret_cast<Floats>(one)).value;
          if constexpr (gated) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), activated_halves(value * reinterpret_cast<Floats>(other)));
            if (z) {
              const __mmask16 mask = first(expert.width - neuron);
              _mm256_mask_storeu_epi16(z, mask, halved(one));
              _mm256_mask_storeu_epi16(z + expert.width, mask, halved(other));
            }
          } else {
            const Floats second = activated<kind>(reinterpret_cast<Floats>(other)).value;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), activated_halves(value));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(h + SIDE), activated_halves(second));
            if (z) {
              _mm256_mask_storeu_epi16(z, first(expert.width - neuron), halved(one));
              _mm256_mask_storeu_epi16(z + SIDE, first(expert.width - neuron - SIDE), halved(other));
            }
          }
        }
      }
    }
  }
}

// The columns [begin, end) of the output, of all experts.
template <bool summed_inner>
void outward(const Pass& pass, const Expert* experts, int64_t count, int64_t begin, int64_t end) {
  thread_local std::vector<Tile> rights;
  for (int64_t token = 0; token < pass.tokens; ++token)
    std::fill(pass.sums + token * pass.hidden + begin, pass.sums + token * pass.hidden + end, 0.0f);
  Sums sums[4];
  for (const Expert* expert = experts; expert < experts + count; ++expert) {
    const int64_t h_stride = whole(expert->width, DEPTH), deep = h_stride / DEPTH, blocks = whole(expert->count, SIDE) / SIDE;
    Operand<uint16_t, summed_inner> weights;
    if constexpr (summed_inner) weights = {expert->down, pass.hidden, expert->width, expert->down_stride};
    else weights = {expert->down, expert->width, pass.hidden, expert->down_stride};
    rights.resize(CHUNK_COLUMNS / SIDE * deep);
    for (int64_t chunk = begin; chunk < end; chunk += CHUNK_COLUMNS) {
      const int64_t wide = whole(std::min(CHUNK_COLUMNS, end - chunk), SIDE) / SIDE;
      in_memory_order<!summed_inner>(wide, deep, [&](int64_t n, int64_t k) {
        weights.by_words(chunk + n * SIDE, k * DEPTH, rights[n * deep + k]);
      });
      for (int64_t n = 0; n < wide; n += 2) {
        const bool two = n + 1 < wide;
        const Tile* b0 = &rights[n * deep];
        for (int64_t m = 0; m < blocks; m += 2) {
          const bool both = m + 1 < blocks;
          const uint16_t* a0 = expert->h + m * SIDE * h_stride;
          sum_four(a0, a0 + SIDE * h_stride, 2 * DEPTH, 2 * h_stride, b0, two ? b0 + deep : b0, deep, both, two);
          _tile_stored(0, sums[0].at, 64);
          if (two) _tile_stored(1, sums[1].at, 64);
          if (both) { _tile_stored(2, sums[2].at, 64); if (two) _tile_stored(3, sums[3].at, 64); }
          const int64_t rows = std::min<int64_t>(both ? 2 * SIDE : SIDE, expert->count - m * SIDE);
          const int64_t column = chunk + n * SIDE;
          const __mmask16 mask = first(end - column), second = two ? first(end - column - SIDE) : 0;
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = expert->first + m * SIDE + i;
            const __m512 score = _mm512_set1_ps(pass.score ? pass.score[row] : 1.0f);
            const Sums* from = sums + 2 * (i / SIDE);
            float* to = pass.sums + pass.token[row] * pass.hidden + column;
            _mm512_mask_storeu_ps(to, mask, _mm512_fmadd_ps(score, _mm512_load_ps(from[0].at[i % SIDE]), _mm512_maskz_loadu_ps(mask, to)));
            if (two) {
              to += SIDE;
              _mm512_mask_storeu_ps(to, second, _mm512_fmadd_ps(score, _mm512_load_ps(from[1].at[i % SIDE]), _mm512_maskz_loadu_ps(second, to)));
            }
          }
        }
      }
    }
  }
  for (int64_t token = 0; token < pass.tokens; ++token)
    for (int64_t column = begin; column < end; column += SIDE) {
      const __mmask16 mask = first(end - column);
      const int64_t at = token * pass.hidden + column;
      _mm256_mask_storeu_epi16(pass.out + at, mask, halved(_mm512_maskz_loadu_ps(mask, pass.sums + at)));
    }
}

template <int kind, bool gated>
void inward(const Pass& pass, const Expert* experts, int64_t count, bool turned, int threads) {
  std::vector<Task> tasks;
  for (int64_t expert = 0; expert < count; ++expert) divide(tasks, expert, experts[expert].count);
  all(tasks, threads, [&](const Task& task) {
    const Expert& expert = experts[task.item];
    if (turned) inner<kind, gated, true>(pass, expert, task.begin, task.end);
    else inner<kind, gated, false>(pass, expert, task.begin, task.end);
  });
}

template <int kind>
int inward(bool gated, const Pass& pass, const Expert* experts, int64_t count, bool turned, int threads) {
  if (gated) inward<kind, true>(pass, experts, count, turned, threads);
  else inward<kind, false>(pass, experts, count, turned, threads);
  return 0;
}

// The output of a pass through experts, those with rows alone. Weights of up are contiguous along H (`up_turned`) or I, those of down
// along I (`down_turned`) or H. Returns 1 for an activation that is not here.
int run_pass(int activation, bool gated, const Pass& pass, const Expert* experts, int64_t count, bool up_turned, bool down_turned,
             int threads) {
  int refused = 1;
  switch (activation) {
    case SILU: refused = inward<SILU>(gated, pass, experts, count, up_turned, threads); break;
    case GELU_TANH: refused = inward<GELU_TANH>(gated, pass, experts, count, up_turned, threads); break;
    case RELU: refused = inward<RELU>(gated, pass, experts, count, up_turned, threads); break;
    case RELU2: refused = inward<RELU2>(gated, pass, experts, count, up_turned, threads); break;
  }
  if (refused) return 1;
  // Few columns at a time, whose sums for all tokens stay in the cache; at least a part for every thread.
  const int64_t hidden = pass.hidden, each = whole(hidden, threads * SIDE) / threads;
  const int64_t cached = MOST_CACHED / (4 * std::max<int64_t>(1, pass.tokens)) / CHUNK_COLUMNS * CHUNK_COLUMNS;
  const int64_t columns = std::max(CHUNK_COLUMNS, std::min(whole(each, CHUNK_COLUMNS), cached));
  std::vector<Task> tasks;
  for (int64_t column = 0; column < hidden; column += columns) tasks.push_back({0, column, std::min(hidden, column + columns)});
  all(tasks, threads, [&](const Task& task) {
    if (down_turned) outward<true>(pass, experts, count, task.begin, task.end);
    else outward<false>(pass, experts, count, task.begin, task.end);
  });
  return 0;
}

}  // namespace
#endif
