// step: one token. A thread per 16 bytes of channels, or per channel where they do not lie side by side.
#include <type_traits>

#include "cuda/causal_conv1d/causal_conv1d_launch.h"
#include "cuda/causal_conv1d/causal_conv1d_plan.h"
#include "cuda/pieces.cuh"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 128, kMostMemory = 7;

/// A number alone.
template <class T>
struct Single {
  static constexpr int kNumbers = 1;
  T number;
  DEVICE_FUNCTION void load(const void* data, int64_t at) {
    number = static_cast<const T*>(data)[at];
  }
  DEVICE_FUNCTION void store(void* data, int64_t at) const { static_cast<T*>(data)[at] = number; }
  DEVICE_FUNCTION float operator[](int) const { return to_float(number); }
  DEVICE_FUNCTION void set(int, float value) { from_float(number, value); }
};
/// Channels of a thread as they are moved.
template <class T, bool kVector>
using Channels = std::conditional_t<kVector, Piece<T>, Single<T>>;

template <class T, bool kVector>
KERNEL_FUNCTION(kThreads, 8)
causal_conv1d_token(const GRID_CONSTANT ConvStepParams p) {
  using Own = Channels<T, kVector>;
  const ConvParameters& parameters = p.parameters;
  const int32_t pieces = parameters.channels / Own::kNumbers, memory = parameters.width - 1;
  const int64_t item = int64_t{prim::block_idx().x} * kThreads + prim::thread_idx().x;
  if (item >= int64_t{p.batch} * pieces) return;
  const int64_t batch = item / pieces;
  const int32_t channel = static_cast<int32_t>(item % pieces) * Own::kNumbers;
  const int64_t state = batch * p.state.batch + channel * p.state.channel;
  Own rows[kMostMemory + 1];
#pragma unroll
  for (int j = 0; j < kMostMemory; ++j)
    if (j < memory) rows[j].load(p.state.data, state + j * p.state.time);
  rows[kMostMemory].load(p.x.data, batch * p.x.batch + channel * p.x.channel);
  Own y;
#pragma unroll
  for (int i = 0; i < Own::kNumbers; ++i) {
    float weights[kMostMemory + 1];  // all loads before the first sum
#pragma unroll
    for (int j = 0; j < kMostMemory; ++j)
      if (j < memory) weights[j] = conv_weight(parameters, channel + i, memory - j);
    weights[kMostMemory] = conv_weight(parameters, channel + i, 0);
    float sum = conv_bias(parameters, channel + i);
#pragma unroll
    for (int j = 0; j < kMostMemory; ++j)
      if (j < memory) sum += weights[j] * rows[j][i];
    sum += weights[kMostMemory] * rows[kMostMemory][i];
    y.set(i, conv_activate<T>(sum, parameters.silu));
  }
  y.store(p.y.data, batch * p.y.batch + channel * p.y.channel);
#pragma unroll
  for (int j = 0; j < kMostMemory; ++j) {
    if (j >= memory) break;
    const int64_t to = state + j * p.state.time;
    if (j + 1 < memory) {
      rows[j + 1].store(p.state.data, to);
    } else {
      rows[kMostMemory].store(p.state.data, to);
    }
  }
}

template <class T, bool kVector>
void launch_token(const ConvStepParams& p, Stream stream) {
  const int64_t items = int64_t{p.batch} * (p.parameters.channels / Channels<T, kVector>::kNumbers);
  prim::launch("causal_conv1d_token", causal_conv1d_token<T, kVector>,
               {static_cast<u32>((items + kThreads - 1) / kThreads), kThreads}, p, stream);
}

}  // namespace

void causal_conv1d_step(const ConvStepParams& params, Stream stream) {
  const auto vector = [&](const ConvView& x) {
    return conv_is_vector(x, params.parameters.channels, params.dtype);
  };
  // A few numbers are so many threads, which wait for less each; many are moved by 16 bytes.
  constexpr int64_t kManyNumbers = 1 << 16;
  const bool many = int64_t{params.batch} * params.parameters.channels >= kManyNumbers;
  const bool all = many && vector(params.x) && vector(params.state) && vector(params.y);
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    all ? launch_token<T, true>(params, stream) : launch_token<T, false>(params, stream);
  });
}

}  // namespace xlstm::cuda
