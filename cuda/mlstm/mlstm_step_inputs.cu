// A block does a batch row. First every thread takes blocks of S channels through convolution, SiLU and projections; q, k and
// v are also left in shared memory, as rounded. Then the gates: each warp has a part of a head's columns and multiplies it with
// the rows of both gates, the first weights of which were on their way meanwhile. Sums have one order.
#include "cuda/mlstm/mlstm_step_inputs.h"

#include <algorithm>
#include <limits>

#include "cuda/causal_conv1d/causal_conv1d_plan.h"
#include "cuda/pieces.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

/// Fewer where the window and the matrix of a thread's block take many registers.
template <class T, int kSize, int kTaps>
constexpr int kThreads = (kTaps + kSize) * kSize * sizeof(T) < 192 ? 512 : 256;
constexpr int kMostWarps = 512 / 32;
constexpr int kLoad = 4;  // pieces of a gate's row that a lane has on their way at once

/// Neighbouring numbers, moved 16 bytes at a time or, where they are fewer, at once. They begin at a multiple of that.
template <class T, int kNumbers>
struct alignas(kNumbers * sizeof(T) < 16 ? kNumbers * sizeof(T) : 16) Neighbours {
  T numbers[kNumbers];

  DEVICE_FUNCTION void load(const void* data, int64_t at) {
    *this = *reinterpret_cast<const Neighbours*>(static_cast<const T*>(data) + at);
  }
  DEVICE_FUNCTION void store(void* data, int64_t at) const {
    *reinterpret_cast<Neighbours*>(static_cast<T*>(data) + at) = *this;
  }
  DEVICE_FUNCTION float operator[](int i) const { return to_float(numbers[i]); }
};

/// The blocks of S channels of one batch row. kTaps: 4 for widths 2 to 4, 8 beyond.
template <class T, int kSize, int kTaps>
class BlocksOfRow {
 public:
  using Own = Neighbours<T, kSize>;

  DEVICE_FUNCTION BlocksOfRow(const MlstmStepInputsParams& params, int64_t batch_row, T* qkv)
      : p(params), row(batch_row), s(qkv) {}

  DEVICE_FUNCTION void run(int32_t block) const {
    const int32_t channel = block * kSize;
    Own x, a;
    convolve(channel, x, a);
    a.store(p.a, row * p.channels + channel);
    project(p.q, block, a, 0);
    project(p.k, block, a, 1);
    project(p.v, block, x, 2);
  }

 private:
  DEVICE_FUNCTION void convolve(int32_t channel, Own& x, Own& a) const {
    const int32_t memory = p.width - 1;
    const int64_t window = row * memory * p.channels + channel;
    Own rows[kTaps - 1];
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j)
      if (j < memory) rows[j].load(p.window, window + int64_t{j} * p.channels);
    x.load(p.x, row * p.x_batch + channel);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float weight[kTaps];
      load_taps(channel + i, weight);
      float sum = bias_of(p.conv_bias, channel + i);
#pragma unroll
      for (int j = 0; j < kTaps - 1; ++j)
        if (j < memory) sum += weight[j] * rows[j][i];
      sum += weight[kTaps - 1] * x[i];
      from_float(a.numbers[i], conv_activate<T>(sum, true));
    }
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
      if (j >= memory) break;
      const int64_t to = window + int64_t{j} * p.channels;
      if (j + 1 < memory) {
        rows[j + 1 < kTaps - 1 ? j + 1 : j].store(p.window, to);
      } else {
        x.store(p.window, to);
      }
    }
  }

  /// A channel's weights, oldest first; that of the token itself is the last one.
  DEVICE_FUNCTION void load_taps(int32_t channel, float (&weight)[kTaps]) const {
    const int64_t at = int64_t{channel} * p.width;
    if (p.width == kTaps) {
      Neighbours<T, kTaps> own;
      own.load(p.conv_weight, at);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) weight[j] = own[j];
      return;
    }
    const T* const from = static_cast<const T*>(p.conv_weight) + at;
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j)
      if (j < p.width - 1) weight[j] = to_float(from[j]);
    weight[kTaps - 1] = to_float(from[p.width - 1]);
  }

  DEVICE_FUNCTION static float bias_of(const void* bias, int64_t channel) {
    return bias == nullptr ? 0.0F : to_float(static_cast<const T*>(bias)[channel]);
  }

  /// Part 0, 1 or 2 of [q, k, v].
  DEVICE_FUNCTION void project(const MlstmStepInputsParams::Projection& map, int32_t block,
                               const Own& in, int part) const {
    const int32_t channel = block * kSize;
    Neighbours<T, kSize * kSize> weight;
    weight.load(map.weight, int64_t{channel} * kSize);
    Own out;
#pragma unroll
    for (int o = 0; o < kSize; ++o) {
      float sum = bias_of(map.bias, channel + o);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += weight[o * kSize + i] * in[i];
      from_float(out.numbers[o], sum);
    }
    out.store(map.out, row * p.channels + channel);
    out.store(s, int64_t{part} * p.channels + channel);
  }

  const MlstmStepInputsParams& p;
  const int64_t row;
  T* const s;
};

/// What a warp does of the gates at a time: pieces [begin, end) of the columns, of both rows of a head.
struct GateTask {
  int32_t head, begin, end;
};

template <class T>
DEVICE_FUNCTION GateTask gate_task(const MlstmStepInputsParams& p, int32_t task, int32_t parts) {
  const int32_t pieces = 3 * p.channels / Piece<T>::kNumbers, length = divide_up(pieces, parts),
                begin = task % parts * length;
  return {task / parts, begin, begin + length < pieces ? begin + length : pieces};
}

/// The weights of both gates that a lane multiplies at once: every 32nd piece from `first` on.
template <class T>
struct GateWeights {
  static constexpr int kNumbers = Piece<T>::kNumbers;
  Piece<T> igate[kLoad], fgate[kLoad];

  DEVICE_FUNCTION void load(const MlstmStepInputsParams& p, const GateTask& task, int32_t first) {
    const int64_t row = int64_t{task.head} * 3 * p.channels;
#pragma unroll
    for (int i = 0; i < kLoad; ++i) {
      const int32_t piece = first + 32 * i;
      const int64_t at = row + int64_t{piece} * kNumbers;
      igate[i].load(p.igate.weight, at, piece < task.end);
      fgate[i].load(p.fgate.weight, at, piece < task.end);
    }
  }

  DEVICE_FUNCTION void multiply(const T* qkv, const GateTask& task, int32_t first,
                                float (&sums)[2]) const {
#pragma unroll
    for (int i = 0; i < kLoad; ++i) {
      const int32_t piece = first + 32 * i;
      Piece<T> x;
      x.load(qkv, int64_t{piece} * kNumbers, piece < task.end);
#pragma unroll
      for (int j = 0; j < kNumbers; ++j) {
        sums[0] += igate[i][j] * x[j];
        sums[1] += fgate[i][j] * x[j];
      }
    }
  }
};

template <class T, int kSize, int kTaps>
KERNEL_FUNCTION(kThreads<T, kSize, kTaps>, 1)
mlstm_step_inputs_rows(const GRID_CONSTANT MlstmStepInputsParams p) {
  constexpr int32_t kStep = kThreads<T, kSize, kTaps>, kWarps = kStep / 32;
  const int32_t thread = static_cast<int32_t>(prim::thread_idx().x), lane = thread % 32,
                warp = thread / 32;
  const int32_t parts = p.num_heads < kWarps ? kWarps / p.num_heads : 1,  // of a head's columns
      tasks = p.num_heads * parts;
  const int64_t row = prim::block_idx().x;
  T* const qkv = reinterpret_cast<T*>(prim::dynamic_shared());
  float* const sums = reinterpret_cast<float*>(qkv + 3 * p.channels);  // [task][gate]

  GateTask task = gate_task<T>(p, warp < tasks ? warp : 0, parts);
  GateWeights<T> weights;
  weights.load(p, task, task.begin + lane);

  const BlocksOfRow<T, kSize, kTaps> blocks(p, row, qkv);
  for (int32_t block = thread; block < p.channels / kSize; block += kStep) blocks.run(block);
  prim::sync_block();

  for (int32_t number = warp; number < tasks; number += kWarps) {
    if (number != warp) {
      task = gate_task<T>(p, number, parts);
      weights.load(p, task, task.begin + lane);
    }
    float own[2] = {};
    for (int32_t first = task.begin + lane;;) {
      weights.multiply(qkv, task, first, own);
      first += 32 * kLoad;
      if (first - lane >= task.end) break;
      weights.load(p, task, first);
    }
#pragma unroll
    for (int gate = 0; gate < 2; ++gate) {
      const float sum = warp_sum(own[gate]);
      if (lane == 0) sums[2 * number + gate] = sum;
    }
  }
  prim::sync_block();

  for (int32_t item = thread; item < 2 * p.num_heads; item += kStep) {
    const int32_t head = item / 2;
    const MlstmStepInputsParams::Gate& gate = item % 2 == 0 ? p.igate : p.fgate;
    float sum = 0;
    for (int32_t part = 0; part < parts; ++part) sum += sums[2 * (head * parts + part) + item % 2];
    sum += to_float(static_cast<const T*>(gate.bias)[head]);
    from_float(static_cast<T*>(gate.out)[row * p.num_heads + head], sum);
  }
}

size_t shared_bytes(int64_t channels, int64_t num_heads, Dtype dtype) {
  return static_cast<size_t>(3 * channels * bytes_of(dtype) +
                             2 * std::max<int64_t>(num_heads, kMostWarps) * 4);
}

template <class T, int kSize, int kTaps>
void launch_rows(const MlstmStepInputsParams& p, Stream stream) {
  prim::launch("mlstm_step_inputs_rows", mlstm_step_inputs_rows<T, kSize, kTaps>,
               {static_cast<u32>(p.batch), kThreads<T, kSize, kTaps>,
                shared_bytes(p.channels, p.num_heads, p.dtype)},
               p, stream);
}

template <class T, int kSize>
void launch_taps(const MlstmStepInputsParams& p, Stream stream) {
  p.width <= 4 ? launch_rows<T, kSize, 4>(p, stream) : launch_rows<T, kSize, 8>(p, stream);
}

}  // namespace

bool mlstm_step_inputs_supported(int64_t channels, int64_t block_size, int64_t num_heads,
                                 Dtype dtype, const DeviceLimits& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 6;
  return (block_size == 2 || block_size == 4 || block_size == 8) && channels > 0 && num_heads > 0 &&
         channels <= kMost && num_heads <= kMost && channels % block_size == 0 &&
         channels * bytes_of(dtype) % 16 == 0 &&
         shared_bytes(channels, num_heads, dtype) <= device.shared_bytes;
}

bool mlstm_step_inputs_aligned(const void* x, int64_t x_batch, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_batch * bytes_of(dtype) % 16 == 0;
}

void launch_mlstm_step_inputs(const MlstmStepInputsParams& params, Stream stream) {
  visit_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (params.block_size == 2) return launch_taps<T, 2>(params, stream);
    if (params.block_size == 4) return launch_taps<T, 4>(params, stream);
    launch_taps<T, 8>(params, stream);
  });
}

}  // namespace xlstm::cuda
