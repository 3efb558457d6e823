// A few tokens through a whole sparse block on a CPU: router, softmax, the K best experts, and a shared expert, in one call.
// T tokens, K experts per token, E experts, H hidden, I width.

#include "routing.hpp"
#include "rows.hpp"

namespace {

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

// Ids and scores of every token: its K experts, then the shared expert, whose id is E, if there is one.
template <class Weight>
void route(const Block& layer, const float* inputs, int64_t tokens, int64_t* ids, float* scores) {
  const int64_t count = layer.num_experts, top_k = layer.top_k;
  std::vector<float> logits(tokens * count), switches(tokens);
  products(static_cast<const Weight*>(layer.router), count, layer.hidden, inputs, tokens, logits.data());
  if (layer.shared_switch)
    products(static_cast<const Weight*>(layer.shared_switch), 1, layer.hidden, inputs, tokens, switches.data());
  std::vector<std::pair<float, int64_t>> all;
  const int64_t slots = top_k + (layer.shared_up ? 1 : 0);
  for (int64_t token = 0; token < tokens; ++token)
    choose<Weight>(layer, logits.data() + token * count, switches[token], all, ids + token * slots, scores + token * slots);
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
