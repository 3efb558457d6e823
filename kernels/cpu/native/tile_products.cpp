// Products of many small bf16 matrices in the processor's tiles (AMX), all of a pass in one call: asked for one by one, a product of
// an expert's few rows takes less time than asking for it. Operands are packed into tiles on the way; sums are fp32, rounded once.

#include "tiles.hpp"

#ifdef UPCYCLE_TILES
namespace {

// fp32 results, written or added to what is there; or bf16 ones.
struct Floats {
  float* at;
  int64_t stride;
  bool add;

  void write(int64_t row, int64_t column, __m512 values, __mmask16 mask) const {
    float* to = at + row * stride + column;
    if (add) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, values);
  }
};

struct Halves {
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

struct Rows {  // of an expert: `at` is its first row, or with an index the first of the matrix that has them
  const void* at;
  const int32_t* index;

  template <class Number, bool summed_inner>
  Operand<Number, summed_inner> operand(int64_t count, int64_t width, int64_t stride) const {
    return {static_cast<const Number*>(at), count, width, stride, index};
  }
};

struct Item {
  Rows rows;
  int64_t count;
  Rows other;
  void* out;
};

struct Sizes {
  int64_t i, j, rows_stride, other_stride, out_stride;
  bool turned, add;
};

template <class Number>
void linear(const Item& item, const Task& task, const Sizes& s) {
  const auto rows = item.rows.operand<Number, true>(item.count, s.j, s.rows_stride);
  const Floats out{static_cast<float*>(item.out), s.out_stride, s.add};
  if (s.turned) multiply(rows, item.other.operand<uint16_t, true>(s.i, s.j, s.other_stride), out, task.begin, task.end, s.j, s.i);
  else multiply(rows, item.other.operand<uint16_t, false>(s.j, s.i, s.other_stride), out, task.begin, task.end, s.j, s.i);
}

template <class Left, class Right>
void outer(const Item& item, const Task& task, const Sizes& s) {
  const auto left = item.rows.operand<Left, false>(item.count, s.i, s.rows_stride);
  const auto right = item.other.operand<Right, false>(item.count, s.j, s.other_stride);
  const Halves out{static_cast<uint16_t*>(item.out), s.out_stride};
  if (s.turned) multiply(right, left, out, task.begin, task.end, item.count, s.i);
  else multiply(left, right, out, task.begin, task.end, item.count, s.j);
}

}  // namespace

// is_outer == 0: out [n, i] (+)= rows [n, j] weight [j, i] of every item, in fp32; the weight is contiguous along j (`turned`) or i.
// is_outer == 1: out [i, j] = rows [n, i]^T other [n, j] in bf16; out is contiguous along j, or (`turned`) along i.
// Strides are those of the other dimension. `halves`: 1 where rows are bf16, 2 where the other side's are, which weights always
// are; else they are fp32. Returns 1 where there are no tiles.
extern "C" int upcycle_tile_products(int is_outer, int halves, const int64_t* items, int64_t count, int64_t i, int64_t j,
                                     int64_t rows_stride, int64_t other_stride, int64_t out_stride, int turned, int add,
                                     int threads) {
  if (!allowed()) return 1;
  const Sizes sizes{i, j, rows_stride, other_stride, out_stride, turned != 0, add != 0};
  const Item* all_items = reinterpret_cast<const Item*>(items);
  std::vector<Task> tasks;
  for (int64_t item = 0; item < count; ++item) divide(tasks, item, !is_outer ? all_items[item].count : turned ? j : i);
  all(tasks, threads, [&](const Task& task) {
    const Item& item = all_items[task.item];
    if (!is_outer) return halves & 1 ? linear<uint16_t>(item, task, sizes) : linear<float>(item, task, sizes);
    if (halves & 1) return outer<uint16_t, float>(item, task, sizes);
    if (halves & 2) return outer<float, uint16_t>(item, task, sizes);
    outer<float, float>(item, task, sizes);
  });
  return 0;
}

#else
extern "C" int upcycle_tile_products(int, int, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int) {
  return 1;
}
#endif
