// Many tokens through a whole sparse block of bf16 weights in the processor's tiles (AMX): router, softmax, the K best experts, and a
// shared expert, in one call. T tokens, K experts per token, E experts, H hidden, I width.

#include "routing.hpp"
#include "tile_experts.hpp"

#ifdef UPCYCLE_TILES
namespace {

// Parts of one piece of memory, each aligned.
struct Room {
  char* at;

  template <class Number>
  Number* take(int64_t count) {
    Number* found = reinterpret_cast<Number*>(at);
    at += whole(count * sizeof(Number), 64);
    return found;
  }
};

// out [T, rows] = x matrix^T
void products(const uint16_t* x, const void* matrix, int64_t tokens, int64_t rows, int64_t hidden, float* out, int threads) {
  const Operand<uint16_t, true> left{x, tokens, hidden, hidden};
  const Operand<uint16_t, true> right{static_cast<const uint16_t*>(matrix), rows, hidden, hidden};
  std::vector<Task> tasks;
  divide(tasks, 0, tokens);
  all(tasks, threads, [&](const Task& task) {
    multiply(left, right, FloatRows{out, rows, false}, task.begin, task.end, hidden, rows);
  });
}

}  // namespace

// The output [T, H] of a block for contiguous x [T, H]. `room` is memory as many_tokens.py counts it. Returns 1 where there are no tiles,
// or for an activation that is not here.
extern "C" int upcycle_tile_blocks(const void* block, const void* x, void* out, int64_t tokens, void* memory, int threads) {
  const Block& layer = *static_cast<const Block*>(block);
  if (!allowed()) return 1;
  const uint16_t* inputs = static_cast<const uint16_t*>(x);
  const int64_t hidden = layer.hidden, experts = layer.num_experts, shared = layer.shared_up ? 1 : 0, slots = layer.top_k + shared;
  const int64_t rows = tokens * slots;
  Room room{static_cast<char*>(memory)};
  float* sums = room.take<float>(tokens * hidden);
  float* logits = room.take<float>(tokens * experts);
  float* switches = room.take<float>(tokens);
  float* scores = room.take<float>(rows);
  float* row_scores = room.take<float>(rows);
  int32_t* ids = room.take<int32_t>(rows);
  int32_t* row_tokens = room.take<int32_t>(rows);
  products(inputs, layer.router, tokens, experts, hidden, logits, threads);
  if (layer.shared_switch) products(inputs, layer.shared_switch, tokens, 1, hidden, switches, threads);
  std::vector<std::pair<float, int64_t>> best;
  for (int64_t token = 0; token < tokens; ++token)
    choose<bfloat16>(layer, logits + token * experts, layer.shared_switch ? switches[token] : 0, best, ids + token * slots,
                     scores + token * slots);
  std::vector<int64_t> ends(experts + 2);  // of every expert's rows, moved by one
  for (int64_t slot = 0; slot < rows; ++slot) ++ends[ids[slot] + 1];
  for (int64_t expert = 0; expert <= experts; ++expert) ends[expert + 1] += ends[expert];
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  for (int64_t slot = 0; slot < rows; ++slot) {
    const int64_t row = next[ids[slot]]++;
    row_tokens[row] = static_cast<int32_t>(slot / slots);
    row_scores[row] = scores[slot];
  }
  std::vector<Expert> chosen;
  const int64_t width = layer.width, matrix = width * hidden;
  for (int64_t id = 0; id < experts + shared; ++id) {
    const int64_t count = ends[id + 1] - ends[id];
    if (!count) continue;
    Expert expert;
    if (id == experts) {
      expert = {static_cast<const uint16_t*>(layer.shared_gate), static_cast<const uint16_t*>(layer.shared_up),
                static_cast<const uint16_t*>(layer.shared_down), hidden, layer.shared_width};
      expert.width = layer.shared_width;
    } else {
      const uint16_t* gate = static_cast<const uint16_t*>(layer.up) + 2 * id * matrix;
      expert = {gate, gate + matrix, static_cast<const uint16_t*>(layer.down) + id * matrix, hidden, width};
      expert.width = width;
    }
    expert.first = ends[id];
    expert.count = count;
    expert.h = room.take<uint16_t>((count + SIDE) * whole(expert.width, DEPTH));
    expert.z = nullptr;
    chosen.push_back(expert);
  }
  const Pass pass{inputs, hidden, hidden, row_tokens, row_scores, tokens, sums, static_cast<uint16_t*>(out)};
  return run_pass(static_cast<int>(layer.activation), true, pass, chosen.data(), chosen.size(), true, true, threads);
}
#else
extern "C" int upcycle_tile_blocks(const void*, const void*, void*, int64_t, void*, int) { return 1; }
#endif
