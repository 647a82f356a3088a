#pragma once
// A block of the sweep: its shared memory, which tokens and columns are its own, and the loads of a chunk.
#include "cuda/mlstm/mlstm_sweep_config.h"
#include "cuda/mlstm/mlstm_tiles.cuh"

namespace xlstm::cuda {

/// x as three bfloat16 numbers whose sum is x: vectors take part in products without loss.
DEVICE_FUNCTION void split_exactly(float x, bf16 (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts[i].bits = prim::float_to_bf16(x);
    x -= to_float(parts[i]);
  }
}

/// x plus the value of the lane whose number differs in the bits `lanes`.
DEVICE_FUNCTION float plus_lane(float x, u32 lanes) {
  return x + prim::float_of(prim::shfl_xor(prim::bits_of(x), lanes));
}

/// What one chunk needs from memory.
template <int kDA, int kDX, int kPlanes>
struct SweepStage {
  Tile<64, kDA, kPlanes> a, b;
  Tile<64, kDX, kPlanes> x;
  GateRecord records[64];
  float z[64];
};

template <Use kUse, int kDA, int kDX, int kPlanes>
struct SweepShared {
  Tile<kDA, kDX, kPlanes> state;
  Tile<64, 64, kPlanes> p;
  Tile<8, 64, 1> weights;  ///< rows 0..2: parts of the tokens' weights in n; the others zero
  /// Per row and column of warps: parts of the product or of the dots.
  alignas(16) float sums[64][4];
  union {
    bf16 n_parts[kDA][8];  ///< kH: columns 0..2 sum to n, the others zero
    float n[kDX];          ///< kDq, kDk
  };
  SweepStage<kDA, kDX, kPlanes> stages[2];  ///< the second one only with p.stages = 2

  static_assert(sizeof(SweepStage<kDA, kDX, kPlanes>) == sweep_stage_bytes({kDA, kDX, kPlanes}));
};

template <Use kUse, int kDA, int kDX, int kPlanes>
class SweepBlock {
 public:
  using Shared = SweepShared<kUse, kDA, kDX, kPlanes>;
  using Stage = SweepStage<kDA, kDX, kPlanes>;
  static_assert(sizeof(Shared) == sweep_shared_bytes({kDA, kDX, kPlanes}, 2));

  DEVICE_FUNCTION SweepBlock(const SweepParams& params, Shared& shared)
      : p(params),
        s(shared),
        thread(static_cast<int>(prim::thread_idx().x)),
        warp(thread / 32),
        group(thread % 32 / 4),
        quad(thread % 4) {
    tile = static_cast<int>(prim::block_idx().x) % tiles();
    const int sequence = sequence_head() / p.chunks.num_heads;
    head = sequence_head() - sequence * p.chunks.num_heads;
    range = sequence_at(p.chunks, sequence);
    chunks = segment_at(p.chunks, range, segment());
    columns = p.x.width - tile * kDX;
    depth = divide_up(p.a.width, 16) * 16;
  }

 protected:
  static constexpr int kThreads = 256;
  static constexpr bool kReverse = kUse == Use::kDv || kUse == Use::kDk;
  static constexpr bool kTransposed = kUse == Use::kDq || kUse == Use::kDk;  ///< S = C^T
  static constexpr bool kHasN = kUse != Use::kDv;
  static constexpr int kNWidth = kTransposed ? kDX : kDA;  ///< n has a number per column of X or B
  static constexpr int kOutTiles = kDX / 32;               ///< 8-column tiles of Out per warp
  static constexpr int kStateRows = kDA / 64;              ///< 16-row tiles of S per warp
  static constexpr int kStateTiles = kDX / 16;             ///< 8-column tiles of S per warp

  // Where ---------------------------------------------------------------------------------------------------------------
  // The first four are asked for before and after the chunks: cheaper to work out again than to keep in registers.
  DEVICE_FUNCTION int tiles() const { return divide_up(p.x.width, kDX); }
  DEVICE_FUNCTION int item() const { return static_cast<int>(prim::block_idx().x) / tiles(); }
  DEVICE_FUNCTION int segment() const { return item() % p.chunks.segments; }
  DEVICE_FUNCTION int sequence_head() const { return item() / p.chunks.segments; }
  DEVICE_FUNCTION int chunk_at(int i) const {
    return kReverse ? chunks.end - 1 - i : chunks.begin + i;
  }
  DEVICE_FUNCTION int64_t slot_at(int i) const {
    return static_cast<int64_t>(head) * p.chunks.slots + range.first_slot + chunk_at(i);
  }
  DEVICE_FUNCTION int token_at(int i) const { return range.begin + chunk_at(i) * 64; }
  DEVICE_FUNCTION int rows_at(int i) const {
    const int left = range.length - chunk_at(i) * 64;
    return left < 64 ? left : 64;
  }
  DEVICE_FUNCTION Stage& stage_at(int i) { return s.stages[p.stages == 2 ? i & 1 : 0]; }

  // Rows and columns of this thread's accumulators.
  DEVICE_FUNCTION int out_row(int m, int half) const {
    return warp / 4 * 32 + 16 * m + 8 * half + group;
  }
  DEVICE_FUNCTION int out_column(int t) const { return warp % 4 * (kDX / 4) + 8 * t + 2 * quad; }
  DEVICE_FUNCTION int score_column(int t) const { return warp % 4 * 16 + 8 * t + 2 * quad; }
  DEVICE_FUNCTION int state_row(int m, int half) const {
    return (warp / 2 * kStateRows + m) * 16 + 8 * half + group;
  }
  DEVICE_FUNCTION int state_column(int t) const { return warp % 2 * (kDX / 2) + 8 * t + 2 * quad; }
  DEVICE_FUNCTION int n_column(int c) const { return 64 * c + 8 * warp + 2 * quad; }

  static DEVICE_FUNCTION float outer(const GateRecord& r) { return kReverse ? r.u : r.w; }
  static DEVICE_FUNCTION float inner(const GateRecord& r) { return kReverse ? r.w : r.u; }

  // Shared memory and loads ---------------------------------------------------------------------------------------------
  DEVICE_FUNCTION void clear_shared() {
    if constexpr (kHasN) {
      for (int i = thread; i < 8 * 64; i += kThreads) s.weights.data[0][i].bits = 0;
    }
    if (kTransposed && p.z == nullptr && thread < 64)
      for (int i = 0; i < p.stages; ++i) s.stages[i].z[thread] = 0;
  }

  DEVICE_FUNCTION void load(int i) {
    Stage& stage = stage_at(i);
    const int rows = rows_at(i), token = token_at(i);
    const int64_t slot = slot_at(i);
    load_tile<kThreads>(stage.a, p.a, token_offset(p.a, range.batch, token, head), rows, 0);
    load_tile<kThreads>(stage.b, p.b, token_offset(p.b, range.batch, token, head), rows, 0);
    load_tile<kThreads>(stage.x, p.x, token_offset(p.x, range.batch, token, head), rows,
                        tile * kDX);
    load_records<kThreads>(stage.records, p.records + slot * 64, 64);
    if (kTransposed && p.z != nullptr && thread < 16)
      prim::cp_async16(&stage.z[4 * thread], p.z + slot * 64 + 4 * thread);
    prim::cp_async_commit();
  }

  /// Sums over the quad into s.sums.
  DEVICE_FUNCTION void publish_sums(float (&sums)[2][2]) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = plus_lane(plus_lane(sums[m][half], 1), 2);
        if (quad == 0) s.sums[out_row(m, half)][warp % 4] = sum;
      }
  }

  const SweepParams& p;
  Shared& s;
  const int thread, warp, group, quad;  ///< group and quad: row and column of a lane in a fragment
  int tile, head, columns, depth;
  SequenceRange range;
  SegmentRange chunks;
};

}  // namespace xlstm::cuda
