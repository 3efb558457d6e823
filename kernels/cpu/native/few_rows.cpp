// A few tokens through their experts on a CPU. T tokens, K experts per token, E experts, H hidden, I width.

#include "rows.hpp"

namespace {

struct Layer {
  int64_t tokens, top_k, num_experts, hidden, width;
  int activation;
  bool gated, interleaved;
};

template <class Weight>
int run(const Layer& layer, const void* x, const void* up_weights, const void* down_weights, const int64_t* ids,
        const float* scores, void* out, int threads) {
  for (int64_t slot = 0; slot < layer.tokens * layer.top_k; ++slot)
    if (ids[slot] < 0) return 1;
  const int64_t matrix = layer.width * layer.hidden, step = layer.interleaved ? 2 * layer.hidden : layer.hidden;
  const auto pick = [&](int64_t id) -> Matrices<Weight> {
    const Weight* up = static_cast<const Weight*>(up_weights) + id * matrix * (layer.gated ? 2 : 1);
    const Weight* down = static_cast<const Weight*>(down_weights) + id * matrix;
    if (!layer.gated) return {nullptr, up, down, layer.width, layer.hidden};
    return {up, up + (layer.interleaved ? layer.hidden : matrix), down, layer.width, step};
  };
  std::unique_ptr<float[]> room;
  const float* inputs = floats(static_cast<const Weight*>(x), layer.tokens * layer.hidden, room);
  run_experts(layer.hidden, layer.top_k, layer.activation, inputs, ids, scores, static_cast<Weight*>(out), layer.tokens,
              layer.num_experts, threads, pick);
  return 0;
}

}  // namespace

// The output [T, H] of experts without biases, up [E, 2I or I, H] and down [E, H, I], for ids [T, K]; ids of E and more have no
// expert. Scores [T, K] in fp32, or null: all 1. Kind: 0 for fp32, 1 for bfloat16 x, weights and output; all are contiguous.
// Returns 0, or 1 for a negative id; nothing was written then. A score that is not finite makes its token's output so.
extern "C" int upcycle_few_rows(int kind, const void* x, const void* up, const void* down, const int64_t* ids,
                                const float* scores, void* out, int64_t tokens, int64_t top_k, int64_t num_experts,
                                int64_t hidden, int64_t width, int activation, int gated, int interleaved, int threads) {
  const Layer layer{tokens, top_k, num_experts, hidden, width, activation, gated != 0, interleaved != 0};
  const auto run_kind = kind == 0 ? run<float> : run<bfloat16>;
  return run_kind(layer, x, up, down, ids, scores, out, threads);
}
