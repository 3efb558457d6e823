// Ternary matrices out of codes that stand for runs of trits. R rows, C columns, W words of at most 64 trits.

#include <atomic>
#include <cstring>
#include <memory>

#include "vectors.hpp"

namespace {

// Bit i of the two numbers of a word says whether its trit i is 1, and -1. Three in four words fit into a core's own cache so.
struct Words {
  const uint64_t* planes;
  const uint8_t* lengths;
  int64_t count;
};

// Which trits of a row are 1, and which are -1, as bits; room for one more word behind the row. Whether the codes fill it, and none
// is left over.
bool bits_of(const Words& words, const uint16_t* code, const uint16_t* end, uint64_t* positive, uint64_t* negative,
             int64_t columns) {
  uint64_t plus = 0, minus = 0;
  int64_t place = 0;
  for (; code != end; ++code) {
    if (*code >= words.count || place >= columns) return false;
    const uint64_t more_plus = words.planes[2 * *code], more_minus = words.planes[2 * *code + 1];
    const int64_t shift = place & 63, after = place + words.lengths[*code];
    positive[place >> 6] = plus |= more_plus << shift;
    negative[place >> 6] = minus |= more_minus << shift;
    // No branch: half of the words cross into the next 64 trits, and no processor guesses which.
    const bool crosses = (after ^ place) >> 6;
    plus = crosses ? (more_plus >> 1) >> (63 - shift) : plus;
    minus = crosses ? (more_minus >> 1) >> (63 - shift) : minus;
    place = after;
  }
  positive[place >> 6] = plus;
  negative[place >> 6] = minus;
  return place >= columns;
}

// Numbers that are made together, one for each bit of a chunk of trits.
template <class Bits>
struct Lanes;
template <>
struct Lanes<uint8_t> {
  using Vector = uint8_t __attribute__((vector_size(8)));
  using Loose = uint8_t __attribute__((vector_size(8), aligned(1), may_alias));
};
template <>
struct Lanes<uint16_t> {
  using Vector = uint16_t __attribute__((vector_size(32)));
  using Loose = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));
};
template <>
struct Lanes<uint32_t> {
  using Vector = uint32_t __attribute__((vector_size(64)));
  using Loose = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
};

template <class Bits>
void row_of(const uint64_t* positive, const uint64_t* negative, int64_t columns, Bits low, Bits high, Bits* out) {
  using Vector = typename Lanes<Bits>::Vector;
  constexpr int64_t CHUNK = sizeof(Vector) / sizeof(Bits);
  Vector bit, highs, lows;
  for (int i = 0; i < CHUNK; ++i) bit[i] = Bits(1) << i, highs[i] = high, lows[i] = low;
  int64_t first = 0;
  for (; first + CHUNK <= columns; first += CHUNK) {
    const Bits plus = Bits(positive[first >> 6] >> (first & 63)), minus = Bits(negative[first >> 6] >> (first & 63));
    const Vector is_high = Vector((bit & plus) == bit), is_low = Vector((bit & minus) == bit);
    *reinterpret_cast<typename Lanes<Bits>::Loose*>(out + first) = (is_high & highs) | (is_low & lows);
  }
  for (; first < columns; ++first) {
    const uint64_t here = uint64_t(1) << (first & 63);
    out[first] = positive[first >> 6] & here ? high : negative[first >> 6] & here ? low : Bits(0);
  }
}

template <class Bits>
int64_t run(const Words& words, const uint16_t* codes, const int64_t* ends, const void* scales, void* out, int64_t rows,
            int64_t columns, int threads) {
  std::atomic<int64_t> damaged{rows};
#pragma omp parallel num_threads(threads)
  {
    const int64_t size = columns / 64 + 2;
    const std::unique_ptr<uint64_t[]> room(new uint64_t[2 * size]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      uint64_t *positive = room.get(), *negative = room.get() + size;
      if (!bits_of(words, codes + ends[row], codes + ends[row + 1], positive, negative, columns)) {
        int64_t before = damaged.load();
        while (row < before && !damaged.compare_exchange_weak(before, row)) {
        }
        continue;
      }
      const Bits* scale = static_cast<const Bits*>(scales) + 2 * row;
      row_of(positive, negative, columns, scale[0], scale[1], static_cast<Bits*>(out) + row * columns);
    }
  }
  return damaged.load() == rows ? -1 : damaged.load();
}

}  // namespace

// Decodes rows [R, C] of numbers of `size` bytes into out. The codes of row r are codes[ends[r]] to codes[ends[r + 1]];
// scales [R, 2] has its values for trit -1 and 1; planes [W, 2] are the words. Writes to *fault the first row whose codes are
// damaged, or -1. Returns 0, or 1 for a size that it does not know.
extern "C" int upcycle_ternary(const uint16_t* codes, const int64_t* ends, const uint64_t* planes,
                               const uint8_t* lengths, int64_t count, const void* scales, void* out, int64_t rows,
                               int64_t columns, int size, int threads, int64_t* fault) {
  const Words words{planes, lengths, count};
  if (size == 1)
    *fault = run<uint8_t>(words, codes, ends, scales, out, rows, columns, threads);
  else if (size == 2)
    *fault = run<uint16_t>(words, codes, ends, scales, out, rows, columns, threads);
  else if (size == 4)
    *fault = run<uint32_t>(words, codes, ends, scales, out, rows, columns, threads);
  else
    return 1;
  return 0;
}
