#pragma once
// Host side of the convolution's launches, shared by both directions.
#include "cuda/causal_conv1d/causal_conv1d_walk.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {

/// About as many blocks as wanted, one wave of a large device; long strips else, as neighbouring strips read some tokens
/// twice.
inline ConvStrips plan_conv_strips(const ConvInputs& in, int32_t channels_of_block,
                                   int64_t many_blocks) {
  constexpr int64_t kFewest = 32, kMost = 512;
  ConvStrips strips;
  strips.tiles = divide_up(in.parameters.channels, channels_of_block);
  const int64_t wanted = int64_t{in.batch} * in.time * strips.tiles / many_blocks / 16 * 16;
  const int64_t tokens = wanted < kFewest ? kFewest : wanted > kMost ? kMost : wanted;
  strips.tokens = static_cast<int32_t>(tokens);
  strips.per_row = divide_up(in.time, strips.tokens);
  strips.count = int64_t{in.batch} * strips.per_row;
  return strips;
}
inline bool conv_is_narrow(const ConvInputs& in) { return in.parameters.width <= 4; }
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

/// Whether rows of channels may be moved 16 bytes at a time.
inline bool conv_is_vector(const ConvView& x, int32_t channels, Dtype dtype) {
  const int64_t bytes = bytes_of(dtype);
  return x.channel == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         channels * bytes % 16 == 0 && x.batch * bytes % 16 == 0 && x.time * bytes % 16 == 0;
}

}  // namespace xlstm::cuda
