// A thread keeps 32 numbers of one column of X in registers, the lanes beside it the rest of the column. What all columns
// of a block need of a token (r, w, the decays of rows) comes by cp.async a tile of tokens ahead.
#include "cuda/gated/gated_recurrence.h"

#include "cuda/numbers.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

constexpr int kThreads = 128, kGroups = 8;  // a thread's numbers: groups of 4
constexpr int kMostLanes = 32;

struct alignas(16) Four {
  float x[4];
};

/// kLanes: threads of a column. Row 4 (group * kLanes + lane) + i is number 4 group + i of a lane: neighbouring lanes read
/// neighbouring 16 bytes.
template <int kLanes, bool kDecaysAcross>
struct RecurrenceTile {
  static constexpr int kAcross = 4 * kGroups * kLanes, kOwn = kThreads / kLanes;
  static constexpr int kTokens = kLanes <= 4 ? 8 : 32 / kLanes;
  struct alignas(16) Stage {
    Four read[kTokens][kAcross / 4], write[kTokens][kAcross / 4];
    Four decay[kTokens][(kDecaysAcross ? kAcross : kOwn) / 4];
    Four weight[kTokens][kOwn / 4];
    int32_t resets[kTokens];
  };
  struct Shared {
    Stage stages[2];
  };
};

template <int kLanes, bool kDecaysAcross>
class RecurrenceBlock {
 public:
  using Tile = RecurrenceTile<kLanes, kDecaysAcross>;
  using Stage = typename Tile::Stage;

  DEVICE_FUNCTION RecurrenceBlock(const GatedRecurrenceParams& params,
                                  typename Tile::Shared& shared)
      : p(params), s(shared) {
    const int32_t blocks = divide_up(p.own, Tile::kOwn);
    const int32_t block = static_cast<int32_t>(prim::block_idx().x);
    sequence = block / blocks;  // and head
    batch = sequence / p.num_heads;
    first_column = block % blocks * Tile::kOwn;
    thread = static_cast<int32_t>(prim::thread_idx().x);
    lane = thread % kLanes;
    column = thread / kLanes;
  }

  DEVICE_FUNCTION void run() {
    begin();
    load(0, 0);
    int stage = 0;
#pragma unroll 1
    for (int32_t first = 0; first < p.time; first += Tile::kTokens, stage ^= 1) {
      prim::cp_async_wait<0>();
      prim::sync_block();
      load(first + Tile::kTokens, stage ^ 1);
#pragma unroll 1
      for (int row = 0; row < steps_from(first); ++row) step(s.stages[stage], row, first + row);
    }
    finish();
  }

 private:
  DEVICE_FUNCTION int steps_from(int32_t first) const {
    return p.time - first < Tile::kTokens ? p.time - first : Tile::kTokens;
  }
  DEVICE_FUNCTION int32_t token_of(int32_t step) const {
    return p.backwards ? p.time - 1 - step : step;
  }
  /// Of a step's row in a (B,T,NH,width) tensor.
  DEVICE_FUNCTION int64_t offset(int32_t step, int32_t width) const {
    const int64_t token = int64_t{batch} * p.time + token_of(step);
    return (token * p.num_heads + sequence % p.num_heads) * width;
  }
  DEVICE_FUNCTION int64_t state_offset(int group, int i) const {
    const int32_t row = 4 * (group * kLanes + lane) + i;
    return int64_t{sequence} * p.across * p.own + int64_t{row} * p.row +
           int64_t{first_column + column} * p.column;
  }
  DEVICE_FUNCTION bool in_state(int group) const {
    return 4 * (group * kLanes + lane) < p.across && first_column + column < p.own;
  }

  /// kWidth numbers of each step from column `from` of a tensor on, zeros behind its width.
  template <int kWidth>
  DEVICE_FUNCTION void copy(Four (&to)[Tile::kTokens][kWidth / 4], const float* data, int32_t width,
                            int32_t from, int32_t first, int steps) const {
    constexpr int kFours = kWidth / 4;
    for (int i = thread; i < steps * kFours; i += kThreads) {
      const int32_t at = from + i % kFours * 4;
      const float* source = data + offset(first + i / kFours, width);
      prim::cp_async16(&to[i / kFours][i % kFours], at < width ? source + at : source,
                       at < width ? 16 : 0);
    }
  }

  DEVICE_FUNCTION void load(int32_t first, int index) {
    const int steps = steps_from(first);
    if (steps <= 0) return;
    Stage& to = s.stages[index];
    copy<Tile::kAcross>(to.read, p.read, p.across, 0, first, steps);
    copy<Tile::kAcross>(to.write, p.write, p.across, 0, first, steps);
    copy<Tile::kOwn>(to.weight, p.weight, p.own, first_column, first, steps);
    if constexpr (kDecaysAcross) {
      copy<Tile::kAcross>(to.decay, p.decay, p.across, 0, first, steps);
    } else {
      copy<Tile::kOwn>(to.decay, p.decay, p.own, first_column, first, steps);
    }
    prim::cp_async_commit();
    if (thread < steps)
      to.resets[thread] =
          p.reset != nullptr && p.reset[int64_t{batch} * p.time + token_of(first + thread)];
  }

  DEVICE_FUNCTION void begin() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[group].x[i] =
            p.start != nullptr && in_state(group) ? p.start[state_offset(group, i)] : 0.0F;
  }

  template <RecurrenceOrder kOrder>
  DEVICE_FUNCTION float pass(const Stage& tile, int row) {
    const float weight = tile.weight[row][column / 4].x[column % 4];
    const float own_decay = kDecaysAcross ? 0.0F : tile.decay[row][column / 4].x[column % 4];
    float sum = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int at = group * kLanes + lane;
      const Four r = tile.read[row][at], w = tile.write[row][at];
      Four d;
      if constexpr (kDecaysAcross) d = tile.decay[row][at];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& number = x[group].x[i];
        const float decay = kDecaysAcross ? d.x[i] : own_decay;
        if (kOrder == RecurrenceOrder::kReadDecayWrite) sum += r.x[i] * number;
        if (kOrder != RecurrenceOrder::kWriteReadDecay) number *= decay;
        number += w.x[i] * weight;
        if (kOrder != RecurrenceOrder::kReadDecayWrite) sum += r.x[i] * number;
        if (kOrder == RecurrenceOrder::kWriteReadDecay) number *= decay;
      }
    }
    return sum;
  }

  DEVICE_FUNCTION float over_lanes(float sum) const {
#pragma unroll
    for (u32 lanes = kLanes / 2; lanes > 0; lanes /= 2)
      sum += prim::float_of(prim::shfl_xor(prim::bits_of(sum), lanes));
    return sum;
  }

  DEVICE_FUNCTION void step(const Stage& tile, int row, int32_t number) {
    const bool resets = tile.resets[row] != 0;
    if (resets && !p.backwards) empty();
    float sum;
    if (p.order == RecurrenceOrder::kDecayWriteRead) {
      sum = pass<RecurrenceOrder::kDecayWriteRead>(tile, row);
    } else if (p.order == RecurrenceOrder::kWriteReadDecay) {
      sum = pass<RecurrenceOrder::kWriteReadDecay>(tile, row);
    } else {
      sum = pass<RecurrenceOrder::kReadDecayWrite>(tile, row);
    }
    if (resets && p.backwards) empty();
    sum = over_lanes(sum);
    if (lane == 0 && first_column + column < p.own)
      p.out[offset(number, p.own) + first_column + column] = sum;
  }

  DEVICE_FUNCTION void empty() {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) x[group] = Four{};
  }

  DEVICE_FUNCTION void finish() const {
    float sum = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (!in_state(group)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (p.end != nullptr) p.end[state_offset(group, i)] = x[group].x[i];
        if (p.end_with != nullptr) sum += p.end_with[state_offset(group, i)] * x[group].x[i];
      }
    }
    if (p.end_with == nullptr) return;
    sum = over_lanes(sum);
    if (lane == 0 && first_column + column < p.own)
      p.end_sums[int64_t{sequence} * p.own + first_column + column] = sum;
  }

  const GatedRecurrenceParams& p;
  typename Tile::Shared& s;
  int32_t sequence, batch, first_column, thread, lane, column;
  Four x[kGroups];
};

template <int kLanes, bool kDecaysAcross>
KERNEL_FUNCTION(kThreads, 4)
gated_recurrence_columns(const GRID_CONSTANT GatedRecurrenceParams p) {
  using Shared = typename RecurrenceTile<kLanes, kDecaysAcross>::Shared;
  RecurrenceBlock<kLanes, kDecaysAcross>(p, *reinterpret_cast<Shared*>(prim::dynamic_shared()))
      .run();
}

template <int kLanes, bool kDecaysAcross>
void launch(const GatedRecurrenceParams& p, Stream stream) {
  using Tile = RecurrenceTile<kLanes, kDecaysAcross>;
  const int64_t blocks = int64_t{p.batch} * p.num_heads * divide_up(p.own, Tile::kOwn);
  prim::launch("gated_recurrence_columns", gated_recurrence_columns<kLanes, kDecaysAcross>,
               {static_cast<u32>(blocks), kThreads, sizeof(typename Tile::Shared)}, p, stream);
}

/// The fewest lanes that hold a column.
template <int kLanes>
void launch_with(const GatedRecurrenceParams& p, Stream stream) {
  if constexpr (kLanes < kMostLanes)
    if (p.across > 4 * kGroups * kLanes) return launch_with<2 * kLanes>(p, stream);
  p.decays_across ? launch<kLanes, true>(p, stream) : launch<kLanes, false>(p, stream);
}

constexpr int kRowThreads = 256;

/// One row of a state, from the last token to the first: `time` numbers of each tensor, `stride` apart. Nothing aliases dg, so
/// that what the next tokens need is read while a sum waits for it.
DEVICE_FUNCTION void sum_back(const float* __restrict__ q, const float* __restrict__ dq,
                              const float* __restrict__ k, const float* __restrict__ dk,
                              const float* __restrict__ decay, const bool* __restrict__ reset,
                              float* __restrict__ dg, float product, int32_t time, int64_t stride,
                              bool bonus) {
#pragma unroll 4
  for (int32_t t = time - 1; t >= 0; --t) {
    const int64_t at = t * stride;
    const float read = q[at] * dq[at], written = k[at] * dk[at], kept = decay[at];
    const bool empty = reset != nullptr && reset[t];
    if (!bonus) product += read;
    product = empty || kept == 0 ? 0.0F : product - written;
    dg[at] = product;
    if (bonus && !empty) product += read;
  }
}

/// A thread per row of a state.
KERNEL_FUNCTION(kRowThreads, 4)
gated_decay_gradient_rows(const GRID_CONSTANT GatedDecayGradientsParams p) {
  const int64_t row = int64_t{prim::block_idx().x} * kRowThreads + prim::thread_idx().x;
  const int64_t width = int64_t{p.num_heads} * p.width;
  if (row >= p.batch * width) return;
  const int64_t batch = row / width, first = batch * p.time * width + row % width;
  sum_back(p.q + first, p.dq + first, p.k + first, p.dk + first, p.decay + first,
           p.reset == nullptr ? nullptr : p.reset + batch * p.time, p.dg + first,
           p.last == nullptr ? 0.0F : p.last[row], p.time, width, p.bonus);
}

}  // namespace

bool gated_recurrence_supported(int64_t across, int64_t own) {
  constexpr int64_t kMost = 4 * kGroups * kMostLanes;
  return across % 4 == 0 && own % 4 == 0 && across <= kMost && own <= kMost;
}

void gated_recurrence(const GatedRecurrenceParams& params, Stream stream) {
  launch_with<1>(params, stream);
}

void gated_decay_gradients(const GatedDecayGradientsParams& params, Stream stream) {
  const int64_t rows = int64_t{params.batch} * params.num_heads * params.width;
  prim::launch("gated_decay_gradient_rows", gated_decay_gradient_rows,
               {static_cast<u32>((rows + kRowThreads - 1) / kRowThreads), kRowThreads}, params,
               stream);
}

}  // namespace xlstm::cuda
