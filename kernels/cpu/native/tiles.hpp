// The processor's tiles (AMX) for products of small bf16 matrices: how operands are packed into them, and tasks divided among threads.
// UPCYCLE_TILES is defined where this processor has them.
//
// A tile holds 16 rows of 16 words of two bf16 numbers that are neighbours in the summed dimension, which has any length:
// zeros fill the last tile.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__linux__)
#define UPCYCLE_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t SIDE = 16, DEPTH = 32;  // rows and columns of a tile of sums; summed numbers of a tile of operands
constexpr int64_t CHUNK_ROWS = 256, CHUNK_COLUMNS = 64;  // that are packed at a time, so that they stay in the cache

struct alignas(64) Tile {
  __m512i rows[SIDE];
};

struct alignas(64) Sums {
  float at[SIDE][SIDE];
};

struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(0, count)) - 1);
}

inline __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? 0xffffffff : static_cast<__mmask32>((uint64_t{1} << std::max<int64_t>(0, count)) - 1);
}

inline __m256i halved(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }

// Words of two rows of numbers: those of the first in the low halves.
inline __m512i paired(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Exchanges rows and words.
inline void turn(Tile& tile) {
  __m512i s[SIDE], t[SIDE];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(tile.rows[i], tile.rows[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(tile.rows[i], tile.rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    t[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
    t[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    t[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), odd = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), odd2 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    tile.rows[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
    tile.rows[i + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    tile.rows[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    tile.rows[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}

// An operand [outer, inner] whose inner dimension is contiguous, in fp32 or bf16. `summed_inner`: the inner one is summed over.
// With an index, its rows are those of a larger matrix that the index names.
template <class Number, bool summed_inner>
struct Operand {
  static constexpr bool by_depth = !summed_inner;
  const Number* at;
  int64_t outer, inner, stride;
  const int32_t* index = nullptr;

  const Number* row(int64_t number) const { return at + (index ? index[number] : number) * stride; }

  static __m256i sixteen(const Number* from, int64_t count) {
    if constexpr (sizeof(Number) == 4) return halved(_mm512_maskz_loadu_ps(first(count), from));
    else return _mm256_maskz_loadu_epi16(first(count), from);
  }

  // 16 kept rows, each with 16 words of the summed dimension.
  void by_rows(int64_t kept, int64_t depth, Tile& tile) const {
    if constexpr (summed_inner) {
      for (int64_t i = 0; i < SIDE; ++i) {
        if (kept + i >= outer) { tile.rows[i] = _mm512_setzero_si512(); continue; }
        const Number* from = row(kept + i) + depth;
        if constexpr (sizeof(Number) == 2) {
          tile.rows[i] = _mm512_maskz_loadu_epi16(first_of_32(inner - depth), from);
        } else {
          const __m512i low = _mm512_castsi256_si512(sixteen(from, inner - depth));
          const int64_t left = inner - depth - 16;
          tile.rows[i] = _mm512_inserti64x4(low, left > 0 ? sixteen(from + 16, left) : _mm256_setzero_si256(), 1);
        }
      }
    } else {
      by_words(kept, depth, tile);
      turn(tile);
    }
  }

  // 16 words of the summed dimension, each of 16 kept columns.
  void by_words(int64_t kept, int64_t depth, Tile& tile) const {
    if constexpr (summed_inner) {
      by_rows(kept, depth, tile);
      turn(tile);
    } else {
      for (int64_t i = 0; i < SIDE; ++i) {
        const int64_t number = depth + 2 * i;
        const __m256i none = _mm256_setzero_si256();
        const __m256i low = number < outer ? sixteen(row(number) + kept, inner - kept) : none;
        const __m256i high = number + 1 < outer ? sixteen(row(number + 1) + kept, inner - kept) : none;
        tile.rows[i] = paired(low, high);
      }
    }
  }
};

// Goes over an operand's tiles as they lie: rows of a large matrix are in a page of memory each, which takes long to find.
template <bool by_depth, class Pack>
inline void in_memory_order(int64_t kept, int64_t deep, Pack pack) {
  if constexpr (by_depth) {
    for (int64_t k = 0; k < deep; ++k)
      for (int64_t n = 0; n < kept; ++n) pack(n, k);
  } else {
    for (int64_t n = 0; n < kept; ++n)
      for (int64_t k = 0; k < deep; ++k) pack(n, k);
  }
}

// Sums up to two rows of tiles times two columns of tiles in the tiles 0 to 3: (0, 1) are of the first row. Left tiles lie `step`
// bytes apart, and their rows `stride` bytes.
inline void sum_four(const void* a0, const void* a1, int64_t step, int64_t stride, const Tile* b0, const Tile* b1, int64_t deep, bool both,
                     bool two) {
  const char *left0 = static_cast<const char*>(a0), *left1 = static_cast<const char*>(a1);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t k = 0; k < deep; ++k) {
    _tile_loadd(4, left0 + k * step, stride); _tile_loadd(6, b0 + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (two) { _tile_loadd(7, b1 + k, 64); _tile_dpbf16ps(1, 4, 7); }
    if (both) {
      _tile_loadd(5, left1 + k * step, stride);
      _tile_dpbf16ps(2, 5, 6);
      if (two) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// fp32 results, written or added to what is there; or bf16 ones.
struct FloatRows {
  float* at;
  int64_t stride;
  bool add;

  void write(int64_t row, int64_t column, __m512 values, __mmask16 mask) const {
    float* to = at + row * stride + column;
    if (add) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, values);
  }
};

struct HalfRows {
  uint16_t* at;
  int64_t stride;

  void write(int64_t row, int64_t column, __m512 values, __mmask16 mask) const {
    _mm256_mask_storeu_epi16(at + row * stride + column, mask, halved(values));
  }
};

template <class Out>
inline void put(const Out& out, const Sums& sums, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const __mmask16 mask = first(columns - column);
  const int64_t count = std::min<int64_t>(SIDE, rows - row);
  for (int64_t i = 0; i < count; ++i) out.write(row + i, column, _mm512_load_ps(sums.at[i]), mask);
}

// The rows [begin, end) of left [rows, depth] times right [depth, columns].
template <class Left, class Right, class Out>
void multiply(const Left& left, const Right& right, const Out& out, int64_t begin, int64_t end, int64_t depth, int64_t columns) {
  thread_local std::vector<Tile> lefts, rights;
  const int64_t deep = (depth + DEPTH - 1) / DEPTH, blocks = (end - begin + SIDE - 1) / SIDE;
  lefts.resize(blocks * deep);
  rights.resize(CHUNK_COLUMNS / SIDE * deep);
  in_memory_order<Left::by_depth>(blocks, deep, [&](int64_t m, int64_t k) {
    left.by_rows(begin + m * SIDE, k * DEPTH, lefts[m * deep + k]);
  });
  Sums sums;
  for (int64_t chunk = 0; chunk < columns; chunk += CHUNK_COLUMNS) {
    const int64_t wide = (std::min(CHUNK_COLUMNS, columns - chunk) + SIDE - 1) / SIDE;
    in_memory_order<Right::by_depth>(wide, deep, [&](int64_t n, int64_t k) {
      right.by_words(chunk + n * SIDE, k * DEPTH, rights[n * deep + k]);
    });
    for (int64_t n = 0; n < wide; n += 2) {
      const bool two = n + 1 < wide;
      const Tile *b0 = &rights[n * deep], *b1 = two ? b0 + deep : b0;
      for (int64_t m = 0; m < blocks; m += 2) {
        const bool both = m + 1 < blocks;
        const Tile *a0 = &lefts[m * deep], *a1 = both ? a0 + deep : a0;
        sum_four(a0, a1, sizeof(Tile), 64, b0, b1, deep, both, two);
        const int64_t row = begin + m * SIDE, column = chunk + n * SIDE;
        _tile_stored(0, sums.at, 64); put(out, sums, row, end, column, columns);
        if (two) { _tile_stored(1, sums.at, 64); put(out, sums, row, end, column + SIDE, columns); }
        if (both) { _tile_stored(2, sums.at, 64); put(out, sums, row + SIDE, end, column, columns); }
        if (both && two) { _tile_stored(3, sums.at, 64); put(out, sums, row + SIDE, end, column + SIDE, columns); }
      }
    }
  }
}

bool allowed() {  // Linux asks every process for leave to use tiles (ARCH_REQ_XCOMP_PERM, XTILEDATA)
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

struct Task {
  int64_t item, begin, end;
};

template <class Run>
void all(const std::vector<Task>& tasks, int threads, Run run) {
  const Shapes shapes;
#ifdef _OPENMP
  if (threads > 1 && tasks.size() > 1) {
#pragma omp parallel num_threads(threads)
    {
      _tile_loadconfig(&shapes);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < tasks.size(); ++i) run(tasks[i]);
      _tile_release();
    }
    return;
  }
#endif
  _tile_loadconfig(&shapes);
  for (const Task& task : tasks) run(task);
  _tile_release();
}

void divide(std::vector<Task>& tasks, int64_t item, int64_t rows) {
  for (int64_t row = 0; row < rows; row += CHUNK_ROWS) tasks.push_back({item, row, std::min(rows, row + CHUNK_ROWS)});
}

}  // namespace
#endif
