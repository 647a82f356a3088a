#pragma once
// state for sm_90a: as mlstm_state.cuh, with wgmma on tiles that the copy engine loads.
//
// A block keeps a tile of S, 256 rows by 128 columns, in the registers of two warpgroups, 128 rows each, and reads 64 tokens
// at a time: S += (c * B)^T X, (c * B)^T from registers. n, the sums of c * B, belongs to the blocks of column tile 0.
#include <cstddef>

#include "cuda/mlstm/hopper/mlstm_twophase_sm90.cuh"

namespace xlstm::cuda {

struct StateParamsSm90 {
  StateParams state;
  prim::TensorMap b, x, states;
};

struct StateShapeSm90 {
  static constexpr int kRows = 256, kColumns = 128, kSlots = 3;
  static constexpr int kConsumerRows = kRows / kConsumers, kRowTiles = kConsumerRows / 64,
                       kWarpRows = 16;

  struct Slot {
    StripTile<kBlockTokens, kRows> b;
    StripTile<kBlockTokens, kColumns> x;
  };
  struct Gates {
    GateRecord records[kBlockTokens];
    float z[kBlockTokens];
  };
  struct Shared {
    Slot slots[kSlots];
    StripTile<kWarpRows, kColumns> rounded[kConsumerWarps][kRowTiles];  ///< on its way to memory
    Gates gates[kSlots];
    Ring<kSlots, kConsumerWarps> ring;
  };
};

#if PRIM_HAS_SM90A

class StateBlockSm90 {
 public:
  using Shape = StateShapeSm90;

  DEVICE_FUNCTION explicit StateBlockSm90(const StateParamsSm90& params)
      : maps(params),
        p(params.state),
        shared(*reinterpret_cast<Shape::Shared*>(prim::dynamic_shared())) {
    const int tiles_x = divide_up(p.dv, Shape::kColumns), tiles_b = divide_up(p.dqk, Shape::kRows);
    int index = static_cast<int>(prim::block_idx().x);
    col0 = index % tiles_x * Shape::kColumns;
    index /= tiles_x;
    row0 = index % tiles_b * Shape::kRows;
    item = index / tiles_b;
    const int sequence = item / p.chunks.segments / p.chunks.num_heads;
    head = item / p.chunks.segments % p.chunks.num_heads;
    range = sequence_at(p.chunks, sequence);
    const SegmentRange chunks = segment_at(p.chunks, range, item % p.chunks.segments);
    per_chunk = p.chunks.length / kBlockTokens;
    const int end = divide_up(range.length, kBlockTokens);
    first_block = chunks.begin * per_chunk;
    blocks = (chunks.end * per_chunk < end ? chunks.end * per_chunk : end) - first_block;
    if (chunks.end == chunks.begin) blocks = 0;
    has_n = col0 == 0 && (p.state_n != nullptr || p.end_n != nullptr || p.segment_n != nullptr);
  }

  DEVICE_FUNCTION void run() {
    prim::require_aligned(&shared, 1024);
    if (prim::thread_idx().x == 0) {
      shared.ring.init();
      prim::fence_mbar_init();
    }
    prim::sync_block();
    const int group = warpgroup_here();
    if (group == 0) {
      prim::set_max_registers_down<kProducerRegisters>();
      if (prim::thread_idx().x == 0) produce();
    } else {
      prim::set_max_registers_up<kConsumerRegisters>();
      consumer = group - 1;
      row0 += consumer * Shape::kConsumerRows;
      if (row0 < p.dqk) {
        consume();
      } else {
        stand_by();
      }
    }
  }

 private:
  using Fragments = u32[Shape::kRowTiles][kBlockTokens / 16][4];

  /// Block of 64 tokens of the sequence that is i-th in this direction.
  DEVICE_FUNCTION int block_at(int i) const {
    return first_block + (p.reverse ? blocks - 1 - i : i);
  }
  DEVICE_FUNCTION bool has_z() const { return p.reverse && p.z != nullptr && has_n; }

  DEVICE_FUNCTION void produce() const {
    const u32 bytes = static_cast<u32>(sizeof(Shape::Slot) + sizeof(Shape::Gates::records) +
                                       (has_z() ? sizeof(Shape::Gates::z) : 0));
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      const int token = block_at(i) * kBlockTokens;
      Shape::Slot& slot = shared.slots[shared.ring.slot(i)];
      Shape::Gates& gates = shared.gates[shared.ring.slot(i)];
      u64* const full = shared.ring.fill(i, bytes);
      load_box_tile(slot.b, maps.b, row0, head, range.begin + token, range.batch, full);
      load_box_tile(slot.x, maps.x, col0, head, range.begin + token, range.batch, full);
      // The slots of a sequence lie side by side, and so do the positions of all its chunks.
      const int64_t position =
          (int64_t{head} * p.chunks.slots + range.first_slot) * p.chunks.length + token;
      prim::bulk_load(gates.records, p.records + position, sizeof gates.records, full);
      if (has_z()) prim::bulk_load(gates.z, p.z + position, sizeof gates.z, full);
    }
  }

  /// The other consumer has all rows; this one keeps the ring going.
  DEVICE_FUNCTION void stand_by() const {
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      shared.ring.wait(i);
      release_slot(shared.ring, i);
    }
  }

  DEVICE_FUNCTION void consume() {
    begin();
    gamma_product = 1;
    Fragments even, odd;
    if (blocks > 0) fetch(0, even);
#pragma unroll 1
    for (int i = 0; i < blocks; i += 2) {
      add(i, even, odd);
      if (i + 1 < blocks) add(i + 1, odd, even);
    }
    finish();
  }

  /// Block i, whose fragments are there; those of the next one are fetched while the product runs.
  DEVICE_FUNCTION void add(int i, Fragments& a, Fragments& next) {
    enter(i);
    multiply(shared.slots[shared.ring.slot(i)], a);
    if (i + 1 < blocks) fetch(i + 1, next);
    prim::wgmma_wait<0>();
    keep(a);  // in registers of their own until here
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) prim::fence_registers(s[m]);
    release_slot(shared.ring, i);
  }

  // Tokens -------------------------------------------------------------------------------------------------------------

  DEVICE_FUNCTION bool clears(int i) const {
    return p.chunks.cu_seqlens != nullptr && tokens_left(i) < kBlockTokens;
  }
  DEVICE_FUNCTION int tokens_left(int i) const { return range.length - block_at(i) * kBlockTokens; }
  /// By those consumers that have rows: all that meet at a barrier come there by the same instruction.
  DEVICE_FUNCTION void clear(Shape::Slot& slot, int i) const {
    const int rows_left = p.dqk - (row0 - Shape::kConsumerRows * consumer);
    const int consumers = rows_left <= Shape::kConsumerRows ? 1 : kConsumers;
    clear_rows(slot.b, tokens_left(i), consumers);
    clear_rows(slot.x, tokens_left(i), consumers);
    meet_consumers(consumers);
  }

  /// Waits for block i and reads (c * B)^T; its part of n is what its rows come to.
  DEVICE_FUNCTION void fetch(int i, Fragments& a) {
    shared.ring.wait(i);
    Shape::Slot& slot = shared.slots[shared.ring.slot(i)];
    const Shape::Gates& gates = shared.gates[shared.ring.slot(i)];
    if (clears(i)) clear(slot, i);
    const int lane = lane_here(), warp = warp_here();
    float sums[Shape::kRowTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kBlockTokens / 16; ++j) {
      const int token = 16 * j + 2 * (lane % 4);
      const u32 near = prim::pack_bf16x2(weight(gates, token), weight(gates, token + 1)),
                far = prim::pack_bf16x2(weight(gates, token + 8), weight(gates, token + 9));
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        fragment_a_transposed(a[m][j], slot.b, Shape::kConsumerRows * consumer + 64 * m + 16 * warp,
                              16 * j);
#pragma unroll
        for (int r = 0; r < 4; ++r) a[m][j][r] = prim::mul_bf16x2(a[m][j][r], r < 2 ? near : far);
      }
      if (has_n) {
        const u32 counts[2] = {n_counts(gates, token), n_counts(gates, token + 8)};
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m)
          prim::mma_bf16(sums[m], a[m][j], counts[0], counts[1]);
      }
    }
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        n_next[m][half] = sums[m][2 * half] + sums[m][2 * half + 1];
  }

  /// What two neighbouring tokens count in n: a product of the warp's own with 8 columns, the even ones of which are the
  /// counts as bfloat16 and the odd ones what rounding left of them.
  DEVICE_FUNCTION u32 n_counts(const Shape::Gates& gates, int token) const {
    const bool rest = lane_here() / 4 % 2 != 0;
    if (!p.reverse) return rest ? 0 : prim::pack_bf16x2(1, 1);
    if (p.z == nullptr) return 0;
    const float low = gates.z[token], high = gates.z[token + 1];
    const u32 rounded = prim::pack_bf16x2(low, high);
    return rest ? prim::pack_bf16x2(low - low_half(rounded), high - high_half(rounded)) : rounded;
  }

  /// Starts S += (c * B)^T X. The fragments must stay until the wait.
  DEVICE_FUNCTION void multiply(Shape::Slot& slot, Fragments& a) {
    keep(a);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) prim::fence_registers(s[m]);
    prim::wgmma_fence();
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
      multiply_fragments<Shape::kColumns, true>(s[m], a[m], strips_of(slot.x));
    prim::wgmma_commit();
  }

  static DEVICE_FUNCTION void keep(Fragments& a) {
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int j = 0; j < kBlockTokens / 16; ++j) prim::fence_registers(a[m][j]);
  }

  DEVICE_FUNCTION float weight(const Shape::Gates& gates, int token) const {
    return p.reverse ? gates.records[token].w : gates.records[token].u;
  }

  // Chunks -------------------------------------------------------------------------------------------------------------

  /// At a chunk's start, in this direction: the state is written down and decays. Then n takes block i.
  DEVICE_FUNCTION void enter(int i) {
    enter_chunk(i);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) n_sum[m][half] += n_next[m][half];
  }
  DEVICE_FUNCTION void enter_chunk(int i) {
    const int block = block_at(i);
    const bool starts =
        p.reverse ? i == 0 || block % per_chunk == per_chunk - 1 : block % per_chunk == 0;
    if (!starts) return;
    const int64_t slot = int64_t{head} * p.chunks.slots + range.first_slot + block / per_chunk;
    const float gamma = p.gamma[slot];
    if (p.states != nullptr) write_state(static_cast<int>(slot));
    if (has_n && p.state_n != nullptr) write_n(p.state_n + slot * padded(p.dqk), padded(p.dqk));
    gamma_product *= gamma;
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int v = 0; v < 64; ++v) s[m][v] *= gamma;
#pragma unroll
      for (int half = 0; half < 2; ++half) n_sum[m][half] *= gamma;
    }
  }

  /// S as bfloat16. Each warp hands its rows to the copy engine, which leaves out what lies outside.
  DEVICE_FUNCTION void write_state(int matrix) {
    const int lane = lane_here(), warp = warp_here();
    auto& rounded = shared.rounded[4 * consumer + warp];
    if (lane == 0) prim::tma_store_wait_read<0>();  // of the state before
    prim::sync_warp();
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) store_rounded(rounded[m], 0, 0, s[m]);
    prim::fence_proxy_async();
    prim::sync_warp();
    if (lane != 0) return;
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int strip = 0; strip < Shape::kColumns / kStripColumns; ++strip)
        prim::tma_store_3d(maps.states, rounded[m].strip(strip), col0 + kStripColumns * strip,
                           row0 + 64 * m + Shape::kWarpRows * warp, matrix);
    prim::tma_store_commit();
  }

  /// n of this warpgroup's rows, as far as `rows`.
  DEVICE_FUNCTION void write_n(float* to, int rows) const {
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        if (lane_here() % 4 == 0 && row < rows) to[row] = n_sum[m][half];
      }
  }

  // Ends ---------------------------------------------------------------------------------------------------------------

  static DEVICE_FUNCTION int warp_here() { return thread_here() / 32 % 4; }
  DEVICE_FUNCTION int row_of(int m, int half) const {
    return row0 + 64 * m + 16 * warp_here() + 8 * half + lane_here() / 4;
  }

  /// Calls visit(number, offset) for the thread's numbers of S that lie in a DQK x DV matrix.
  template <class Visit>
  DEVICE_FUNCTION void each_number(Visit visit) {
    const int col = col0 + 2 * (lane_here() % 4);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        const int left = row < p.dqk ? p.dv - col : 0;
        const int64_t offset = int64_t{row} * p.dv + col;
#pragma unroll
        for (int n = 0; n < Shape::kColumns / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * n + e < left) visit(s[m][4 * n + 2 * half + e], offset + 8 * n + e);
      }
  }

  DEVICE_FUNCTION void begin() {
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int v = 0; v < 64; ++v) s[m][v] = 0;
    if (p.start_c != nullptr) {
      const float* const from = p.start_c + int64_t{item} * p.dqk * p.dv;
      each_number([from](float& x, int64_t offset) { x = from[offset]; });
    }
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        n_sum[m][half] =
            p.start_n != nullptr && row < p.dqk ? p.start_n[int64_t{item} * p.dqk + row] : 0.0F;
      }
  }

  DEVICE_FUNCTION void write_c(float* to) {
    each_number([to](float x, int64_t offset) { to[offset] = x; });
  }

  DEVICE_FUNCTION void finish() {
    if (lane_here() == 0) prim::tma_store_wait<0>();
    const int64_t owner = item / p.chunks.segments;
    const int segment = item % p.chunks.segments;
    const bool last = segment == (p.reverse ? 0 : p.chunks.segments - 1);
    if (last && p.end_c != nullptr) write_c(p.end_c + owner * p.dqk * p.dv);
    if (last && p.end_n != nullptr && has_n) write_n(p.end_n + owner * p.dqk, p.dqk);
    if (p.segment_c != nullptr) write_c(p.segment_c + int64_t{item} * p.dqk * p.dv);
    if (p.segment_n != nullptr && has_n) write_n(p.segment_n + int64_t{item} * p.dqk, p.dqk);
    if (p.segment_gamma != nullptr && row0 == 0 && col0 == 0 && thread_here() % 128 == 0)
      p.segment_gamma[item] = gamma_product;
  }

  const StateParamsSm90& maps;
  const StateParams& p;
  Shape::Shared& shared;
  SequenceRange range;
  int item, head;
  int row0, col0;                      // of the tile; in a consumer row0 is of its own rows
  int first_block, blocks, per_chunk;  // of 64 tokens
  bool has_n;
  int consumer = 0;
  float s[Shape::kRowTiles][64];
  float n_sum[Shape::kRowTiles][2], n_next[Shape::kRowTiles][2];  // of row_of(); of the next block
  float gamma_product;
};

#endif

KERNEL_FUNCTION(kTwoPhaseSm90Threads, 1)
mlstm_state_sm90(const GRID_CONSTANT StateParamsSm90 p) {
#if PRIM_HAS_SM90A
  StateBlockSm90(p).run();
#else
  prim::wgmma_fence();  // traps
#endif
}

}  // namespace xlstm::cuda
