// What a stock sparse block does with its router's logits: softmax, the K best experts, and their scores.
// T tokens, K experts per token, E experts, H hidden, I width.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "vectors.hpp"

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

// Ids and scores of a token with the router's logits `values [E]`, which are overwritten: its K experts, then the shared expert, whose
// id is E, if there is one; `with` is the product of the token and the shared expert's switch. `all` is room for E.
template <class Weight, class Id>
void choose(const Block& layer, float* values, float with, std::vector<std::pair<float, int64_t>>& all, Id* ids, float* scores) {
  const int64_t count = layer.num_experts, top_k = layer.top_k;
  for (int64_t i = 0; i < count; ++i) values[i] = rounded(values[i], static_cast<const Weight*>(nullptr));
  softmax(values, count);
  all.resize(count);
  for (int64_t i = 0; i < count; ++i) all[i] = {values[i], i};
  sort_best(all, top_k);
  float sum = 0;
  for (int64_t k = 0; k < top_k; ++k) sum += all[k].first;
  for (int64_t k = 0; k < top_k; ++k) {
    const float score = layer.normalized ? all[k].first / sum : all[k].first;
    ids[k] = static_cast<Id>(all[k].second);
    scores[k] = layer.rounded ? rounded(score, static_cast<const Weight*>(nullptr)) : score;
  }
  if (layer.shared_up) {
    ids[top_k] = static_cast<Id>(count);
    scores[top_k] = layer.shared_switch ? 1 / (1 + std::exp(-with)) : 1;
  }
}

}  // namespace
