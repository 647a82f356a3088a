// step: one token, the state updated in place; reading and writing C once is what the time goes into. With few heads the
// columns of C are spread over blocks, which all read the old n and m: these are then replaced by a second launch.
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_step.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 512;  // of q and k in shared memory at a time

/// A step as one launch does it.
struct StepLaunch {
  StepParams step;
  int32_t columns = 64;    ///< of C, a block at a time: 32 or 64
  int32_t tiles = 1;       ///< of `columns` columns
  bool whole_head = true;  ///< a block does all tiles of its head and replaces n and m itself
  bool vector = false;     ///< rows of C may be read 16 bytes at a time
};

/// exp of the differences of the logarithms.
struct StepGates {
  float forget, input, floor, m;
};

DEVICE_FUNCTION StepGates gates_of(const StepParams& p, int item) {
  const float f = StepRow(p.call.fgate, p, item, p.fgate_dtype)[0];
  const float i = StepRow(p.call.igate, p, item, p.igate_dtype)[0];
  const double log_forget = at_least(log_sigmoid(f), kMinLogForget);
  const double log_input = at_least(p.sigmoid_input_gate ? log_sigmoid(i) : i, kMinLogInput);
  if (p.sigmoid_input_gate)
    return {exp2_of(log_forget * kLog2e), exp2_of(log_input * kLog2e), 1, 0};
  const double decayed = log_forget + at_least(p.call.m[item], kMinLogInput);
  const double m = static_cast<double>(static_cast<float>(max_nan(decayed, log_input)));
  return {exp2_of((decayed - m) * kLog2e), exp2_of((log_input - m) * kLog2e), floor_of(m),
          static_cast<float>(m)};
}

class StepBlock {
 public:
  struct Shared {
    float q[kRows], k[kRows];
    float sums[kThreads * 4];  ///< [group of rows][column]
    float warps[kWarps];
  };

  DEVICE_FUNCTION StepBlock(const StepLaunch& launch, Shared& shared, int head)
      : l(launch),
        p(launch.step),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        item(head),
        q(p.call.q, p, head, p.dtype),
        k(p.call.k, p, head, p.dtype),
        gates(gates_of(p, head)) {}

  /// 1 / N, and the new n and m where this block owns them. All threads of the block.
  DEVICE_FUNCTION float update_normaliser(bool owner) {
    float* n = p.call.n + int64_t{item} * p.dqk;
    float sum = 0;
    if (p.normalize || owner) {
      for (int d = thread; d < p.dqk; d += kThreads) {
        const float value = gates.forget * n[d] + gates.input * k[d];
        sum += q[d] * value;
        if (owner) n[d] = value;
      }
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0) s.warps[thread / 32] = sum;
    prim::sync_block();  // and every thread has read the old m
    if (owner && thread == 0) p.call.m[item] = gates.m;
    if (!p.normalize) return 1;
    float product = 0;
    for (int i = 0; i < kWarps; ++i) product += s.warps[i];
    product *= p.scale;
    const float size = product < 0 ? -product : product;
    return 1.0F / ((size <= gates.floor ? gates.floor : size) + p.eps);
  }

  /// The columns of a tile: C in place, and h = factor * C^T q. All threads of the block.
  template <bool kVector>
  DEVICE_FUNCTION void update_tile(int tile, float factor) {
    const int quads = l.columns / 4, groups = kThreads / quads;
    const int group = thread / quads, col = tile * l.columns + thread % quads * 4;
    float value[4], sum[4] = {};
    const StepRow v(p.call.v, p, item, p.dtype);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = col + i < p.dv ? gates.input * v[col + i] : 0.0F;
    for (int first = 0; first < p.dqk; first += kRows) {
      const int rows = p.dqk - first < kRows ? p.dqk - first : kRows;
      load_rows(first, rows);
      float* c = p.call.c + (int64_t{item} * p.dqk + first) * p.dv + col;
      if (col < p.dv) update_rows<kVector>(c, group, groups, rows, p.dv - col, value, sum);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s.sums[thread * 4 + i] = sum[i];
    prim::sync_block();
    const int out = tile * l.columns + thread;
    if (thread < l.columns && out < p.dv) {
      float total = 0;
      for (int g = 0; g < groups; ++g) total += s.sums[g * l.columns + thread];
      const View& h = p.call.h;
      store_number(h.data,
                   item / p.num_heads * h.batch + item % p.num_heads * h.head + out * h.inner,
                   p.dtype, total * factor);
    }
  }

 private:
  /// q and k of rows [first, first + rows).
  DEVICE_FUNCTION void load_rows(int first, int rows) {
    prim::sync_block();
    for (int row = thread; row < rows; row += kThreads) {
      s.q[row] = q[first + row];
      s.k[row] = k[first + row];
    }
    prim::sync_block();
  }

  template <bool kVector>
  DEVICE_FUNCTION void update_rows(float* c, int group, int groups, int rows, int width,
                                   const float (&value)[4], float (&sum)[4]) const {
    constexpr int kInFlight = kVector ? 4 : 2;
    int row = group;
    for (; row + (kInFlight - 1) * groups < rows; row += kInFlight * groups) {
      float x[kInFlight][4];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
        load_four<kVector>(c + int64_t{row + j * groups} * p.dv, width, x[j]);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
        update_row<kVector>(c, row + j * groups, width, x[j], value, sum);
    }
    for (; row < rows; row += groups) {
      float x[4];
      load_four<kVector>(c + int64_t{row} * p.dv, width, x);
      update_row<kVector>(c, row, width, x, value, sum);
    }
  }

  template <bool kVector>
  DEVICE_FUNCTION void update_row(float* c, int row, int width, float (&x)[4],
                                  const float (&value)[4], float (&sum)[4]) const {
    const float q_row = s.q[row], k_row = s.k[row];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = gates.forget * x[i] + k_row * value[i];
      sum[i] += q_row * x[i];
    }
    store_four<kVector>(c + int64_t{row} * p.dv, width, x);
  }

  const StepLaunch& l;
  const StepParams& p;
  Shared& s;
  const int thread, item;
  const StepRow q, k;
  const StepGates gates;
};

KERNEL_FUNCTION(kThreads, 2)
mlstm_step_columns(const GRID_CONSTANT StepLaunch l) {
  const int tasks = l.whole_head ? 1 : l.tiles, block = static_cast<int>(prim::block_idx().x);
  StepBlock step(l, *reinterpret_cast<StepBlock::Shared*>(prim::dynamic_shared()), block / tasks);
  const float factor = l.step.scale * step.update_normaliser(l.whole_head);
  const int first = block % tasks, end = l.whole_head ? l.tiles : first + 1;
  for (int tile = first; tile < end; ++tile) {
    if (l.vector) {
      step.update_tile<true>(tile, factor);
    } else {
      step.update_tile<false>(tile, factor);
    }
  }
}

KERNEL_FUNCTION(kThreads)
mlstm_step_normaliser(const GRID_CONSTANT StepLaunch l) {
  StepBlock(l, *reinterpret_cast<StepBlock::Shared*>(prim::dynamic_shared()),
            static_cast<int>(prim::block_idx().x))
      .update_normaliser(true);
}

}  // namespace

void launch_step(const StepParams& params, Stream stream) {
  // Enough heads to fill any device twice: one launch. Else narrow tiles, until there are about as many blocks.
  constexpr int32_t kManyBlocks = 256;
  const int32_t items = params.batch * params.num_heads;
  StepLaunch l;
  l.step = params;
  l.columns = items * divide_up(params.dv, 64) < kManyBlocks ? 32 : 64;
  l.tiles = divide_up(params.dv, l.columns);
  l.whole_head = items >= kManyBlocks || l.tiles == 1;
  l.vector = params.dv % 4 == 0 && reinterpret_cast<uintptr_t>(params.call.c) % 16 == 0;
  const prim::LaunchShape columns{static_cast<u32>(l.whole_head ? items : items * l.tiles),
                                  kThreads, sizeof(StepBlock::Shared)};
  prim::launch("mlstm_step_columns", mlstm_step_columns, columns, l, stream);
  if (l.whole_head) return;
  prim::launch("mlstm_step_normaliser", mlstm_step_normaliser,
               {static_cast<u32>(items), kThreads, sizeof(StepBlock::Shared)}, l, stream);
}

void mlstm_step(const MlstmProblem& problem, const MlstmStep& call, Stream stream) {
  launch_step(step_params(problem, call), stream);
}

}  // namespace xlstm::cuda
