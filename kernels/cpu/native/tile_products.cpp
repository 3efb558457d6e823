// Products of many small bf16 matrices in the processor's tiles (AMX), all of a pass in one call: asked for one by one, a product of
// an expert's few rows takes less time than asking for it. Operands are packed into tiles on the way; sums are fp32, rounded once.

#include "tiles.hpp"

#ifdef UPCYCLE_TILES
namespace {

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
  const FloatRows out{static_cast<float*>(item.out), s.out_stride, s.add};
  if (s.turned) multiply(rows, item.other.operand<uint16_t, true>(s.i, s.j, s.other_stride), out, task.begin, task.end, s.j, s.i);
  else multiply(rows, item.other.operand<uint16_t, false>(s.j, s.i, s.other_stride), out, task.begin, task.end, s.j, s.i);
}

template <class Left, class Right>
void outer(const Item& item, const Task& task, const Sizes& s) {
  const auto left = item.rows.operand<Left, false>(item.count, s.i, s.rows_stride);
  const auto right = item.other.operand<Right, false>(item.count, s.j, s.other_stride);
  const HalfRows out{static_cast<uint16_t*>(item.out), s.out_stride};
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
