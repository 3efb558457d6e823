// A few tokens through a whole sparse block on a CPU: router, softmax, the K best experts, and a shared expert, in one call.
// T tokens, K experts per token, E experts, H hidden, I width.

#include <utility>

#include "rows.hpp"

namespace {

// As BlockStructure of few_blocks.py.
struct Block {
  const void *router;                                 // [E, H]
  const void *up, *down;                              // [E, 2I, H], gate rows first, and [E, H, I]
  const void *shared_gate, *shared_up, *shared_down;  // [I', H] twice and [H, I'], or null
  const void *shared_switch;                          // [1, H]: its sigmoid multiplies the shared expert's output; null: 1
  int64_t hidden, num_experts, top_k, width, shared_width;
  int64_t kind, activation, normalized, rounded;
};

inline float rounded(float value, const float*) { return value; }

inline float rounded(float value, const bfloat16*) {
  bfloat16 stored;
  store(value, &stored);
  return widened(stored);
}

// out[n][r] = matrix[r] . inputs[n], for n tokens
template <class Weight>
void products(const Weight* matrix, int64_t rows, int64_t hidden, const float* inputs, int64_t tokens, float* out) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t token = 0; token < tokens; ++token) {
      const Weight* const one[1] = {matrix + row * hidden};
      const float* const input[1] = {inputs + token * hidden};
      float made[1][1];
      dots<1, 1>(one, input, hidden, made);
      out[token * rows + row] = made[0][0];
    }
}

void softmax(float* values, int64_t count) {
  const float most = *std::max_element(values, values + count);  // a NaN anywhere makes the sum one
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - most);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

// The best `count` of all, best first. These are the calls by which torch.topk finds them on a CPU (TopKImpl.h), so that ties, which
// these algorithms resolve as it happens, fall the same way. A NaN is above everything.
void sort_best(std::vector<std::pair<float, int64_t>>& all, int64_t count) {
  using Element = std::pair<float, int64_t>;
  const auto above = [](const Element& x, const Element& y) {
    return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
  };
  if (count * 64 <= static_cast<int64_t>(all.size())) {
    std::partial_sort(all.begin(), all.begin() + count, all.end(), above);
  } else {
    std::nth_element(all.begin(), all.begin() + count - 1, all.end(), above);
    std::sort(all.begin(), all.begin() + count - 1, above);
  }
}

// Ids and scores of every token: its K experts, then the shared expert, whose id is E, if there is one.
template <class Weight>
void route(const Block& layer, const float* inputs, int64_t tokens, int64_t* ids, float* scores) {
  const int64_t count = layer.num_experts, top_k = layer.top_k;
  std::vector<float> logits(tokens * count), switches(tokens);
  products(static_cast<const Weight*>(layer.router), count, layer.hidden, inputs, tokens, logits.data());
  if (layer.shared_switch)
    products(static_cast<const Weight*>(layer.shared_switch), 1, layer.hidden, inputs, tokens, switches.data());
  std::vector<std::pair<float, int64_t>> all(count);
  for (int64_t token = 0; token < tokens; ++token) {
    float* values = logits.data() + token * count;
    for (int64_t i = 0; i < count; ++i) values[i] = rounded(values[i], static_cast<const Weight*>(nullptr));
    softmax(values, count);
    for (int64_t i = 0; i < count; ++i) all[i] = {values[i], i};
    sort_best(all, top_k);
    float sum = 0;
    for (int64_t k = 0; k < top_k; ++k) sum += all[k].first;
    for (int64_t k = 0; k < top_k; ++k) {
      const float score = layer.normalized ? all[k].first / sum : all[k].first;
      *ids++ = all[k].second;
      *scores++ = layer.rounded ? rounded(score, static_cast<const Weight*>(nullptr)) : score;
    }
    if (layer.shared_up) {
      *ids++ = count;
      *scores++ = layer.shared_switch ? 1 / (1 + std::exp(-switches[token])) : 1;
    }
  }
}

template <class Weight>
int run(const Block& layer, const void* x, void* out, int64_t tokens, int threads) {
  const int64_t slots = layer.top_k + (layer.shared_up ? 1 : 0), matrix = layer.width * layer.hidden;
  std::unique_ptr<float[]> room;
  const float* inputs = floats(static_cast<const Weight*>(x), tokens * layer.hidden, room);
  std::vector<int64_t> ids(tokens * slots);
  std::vector<float> scores(tokens * slots);
  route<Weight>(layer, inputs, tokens, ids.data(), scores.data());
  const auto pick = [&](int64_t id) -> Matrices<Weight> {
    if (id == layer.num_experts)
      return {static_cast<const Weight*>(layer.shared_gate), static_cast<const Weight*>(layer.shared_up),
              static_cast<const Weight*>(layer.shared_down), layer.shared_width, layer.hidden};
    const Weight* up = static_cast<const Weight*>(layer.up) + 2 * id * matrix;
    return {up, up + matrix, static_cast<const Weight*>(layer.down) + id * matrix, layer.width, layer.hidden};
  };
  run_experts(layer.hidden, slots, static_cast<int>(layer.activation), inputs, ids.data(), scores.data(),
              static_cast<Weight*>(out), tokens, layer.num_experts + 1, threads, pick);
  return 0;
}

}  // namespace

// The output [T, H] of a block for x [T, H]. Kind: 0 for fp32, 1 for bfloat16 x, weights and output; all are contiguous. Router logits
// are rounded to that dtype, as the block's own products are, and scores, if `rounded`. Returns 0.
extern "C" int upcycle_few_blocks(const void* block, const void* x, void* out, int64_t tokens, int threads) {
  const Block& layer = *static_cast<const Block*>(block);
  return layer.kind == 0 ? run<float>(layer, x, out, tokens, threads) : run<bfloat16>(layer, x, out, tokens, threads);
}
