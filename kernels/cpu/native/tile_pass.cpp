// A pass of tokens through experts that somebody else chose; see tile_experts.hpp.

#include "tile_experts.hpp"

// The output [T, H] in bf16, for x [T, H] that lies `x_stride` apart, and its sums in fp32. `experts`: `count` of struct Expert. Returns 1
// where there are no tiles, or for an activation that is not here.
#ifdef UPCYCLE_TILES
extern "C" int upcycle_tile_pass(int activation, int gated, const void* experts, int64_t count, const void* x, int64_t x_stride,
                                 int64_t hidden, const int32_t* token, const float* score, int64_t tokens, int up_turned,
                                 int down_turned, float* sums, void* out, int threads) {
  if (!allowed()) return 1;
  const Pass pass{static_cast<const uint16_t*>(x), x_stride, hidden, token, score, tokens, sums, static_cast<uint16_t*>(out)};
  return run_pass(activation, gated != 0, pass, static_cast<const Expert*>(experts), count, up_turned != 0, down_turned != 0, threads);
}
#else
extern "C" int upcycle_tile_pass(int, int, const void*, int64_t, const void*, int64_t, int64_t, const int32_t*, const float*, int64_t,
                                 int, int, float*, void*, int) {
  return 1;
}
#endif
