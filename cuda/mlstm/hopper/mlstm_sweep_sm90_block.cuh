#pragma once
// A block of the sm_90a sweep: its shared memory, which tokens and columns are its own, and the thread that loads.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_config.h"
#include "cuda/mlstm/hopper/mlstm_tiles_sm90.cuh"
#include "cuda/mlstm/mlstm_sweep_output.cuh"

namespace xlstm::cuda {

/// Eight rows of k numbers as a K-major operand of wgmma without swizzle: vectors as sums of three bfloat16 numbers, which
/// take part in products without loss. Rows 0..2 hold the parts, the others are zero.
template <int kCount>
struct alignas(128) SideRows {
  static_assert(kCount % 16 == 0);
  bf16 data[kCount * 8];

  DEVICE_FUNCTION void set(int k, float x) {
    bf16 parts[3];
    split_exactly(x, parts);
#pragma unroll
    for (int i = 0; i < 3; ++i) data[k / 8 * 64 + i * 8 + k % 8] = parts[i];
  }
  /// Of k0 .. k0+15.
  DEVICE_FUNCTION u64 descriptor(int k0) {
    return prim::wgmma_descriptor(prim::shared_u32(data) + static_cast<u32>(k0) * 16, 128, 128,
                                  prim::Swizzle::kNone);
  }
};

/// Where a block works. In shared memory: read once per chunk, it would only take registers.
struct SweepSm90Place {
  int tile, head, columns;  ///< columns of X from the tile's first on
  SequenceRange range;
  SegmentRange chunks;
};

template <Use kUse, int kDA, int kDX>
struct SweepSm90Shared {
  static constexpr SweepSm90Tile kTile = {kDA, kDX};
  static constexpr int kAbSlots = sweep_sm90_ab_slots(kTile), kXSlots = sweep_sm90_x_slots(kTile);
  static constexpr int kGateSlots = 2;
  static constexpr int kLength = kSweepSm90Length;

  StripTile<kBoxRows, kDA> ab[kAbSlots];
  StripTile<kBoxRows, kDX> x[kXSlots];
  StripTile<kDA, kDX> state;
  SideRows<kLength> weights;  ///< of the tokens in n
  SideRows<kDA> n_parts;      ///< kH
  alignas(16) GateRecord records[kGateSlots][kLength];
  alignas(16) float z[kGateSlots][kLength];
  float n[kDX];                       ///< kDq, kDk
  alignas(4) bf16 inner[2][kLength];  ///< weights of the tokens in the state; by chunk: read late
  Ring<kAbSlots, 8> ab_ring;
  Ring<kXSlots, 8> x_ring;
  Ring<kGateSlots, 8> gate_ring;
  u64 state_ready, state_free;
  SweepSm90Place place;
};

/// What all threads of a block know.
template <Use kUse, int kDA, int kDX>
class SweepSm90Block {
 public:
  using Shared = SweepSm90Shared<kUse, kDA, kDX>;
  static constexpr int kLength = kSweepSm90Length;
  static constexpr bool kReverse = kUse == Use::kDv || kUse == Use::kDk;
  static constexpr bool kTransposed = kUse == Use::kDq || kUse == Use::kDk;  ///< S = C^T
  static constexpr bool kHasN = kUse != Use::kDv;

  DEVICE_FUNCTION SweepSm90Block(const SweepSm90Params& params, Shared& shared)
      : p(params.sweep), maps(params), s(shared), place(shared.place) {}

  /// All threads, before the block's first barrier.
  DEVICE_FUNCTION void prepare() {
    const int thread = static_cast<int>(prim::thread_idx().x);
    prim::require_aligned(&s, 1024);
    if (thread == 0) {
      s.place = find_place();
      s.ab_ring.init();
      s.x_ring.init();
      s.gate_ring.init();
      prim::mbar_init(&s.state_ready, 8);
      prim::mbar_init(&s.state_free, 8);
      prim::fence_mbar_init();
    }
    for (int i = thread; i < kLength * 8; i += kThreads) s.weights.data[i].bits = 0;
    for (int i = thread; i < kDA * 8; i += kThreads) s.n_parts.data[i].bits = 0;
    if (kTransposed && p.z == nullptr && thread < kLength)
      for (int i = 0; i < Shared::kGateSlots; ++i) s.z[i][thread] = 0;
  }

  /// One thread: the loads of all chunks, as slots become free.
  DEVICE_FUNCTION void load_chunks() {
    const bool with_z = kTransposed && p.z != nullptr;
    for (int i = 0; i < count(); ++i) {
      const int64_t position = slot_at(i) * kLength;
      constexpr u32 kRecordBytes = kLength * sizeof(GateRecord), kZBytes = kLength * sizeof(float);
      u64* bar = s.gate_ring.fill(i, kRecordBytes + (with_z ? kZBytes : 0));
      const int gate = s.gate_ring.slot(i);
      prim::bulk_load(s.records[gate], p.records + position, kRecordBytes, bar);
      if (with_z) prim::bulk_load(s.z[gate], p.z + position, kZBytes, bar);
      for (int half = 0; half < 2; ++half) load_half(maps.a, s.ab, s.ab_ring, 4 * i, half, i, 0);
      for (int half = 0; half < 2; ++half)
        load_half(maps.b, s.ab, s.ab_ring, 4 * i + 2, half, i, 0);
      for (int half = 0; half < 2; ++half)
        load_half(maps.x, s.x, s.x_ring, 2 * i, half, i, place.tile * kDX);
    }
  }

 protected:
  static constexpr int kThreads = 384;

  // The first four are asked for before and after the chunks: cheaper to work out again than to keep in registers.
  DEVICE_FUNCTION int tiles() const { return divide_up(p.x.width, kDX); }
  DEVICE_FUNCTION int item() const { return static_cast<int>(prim::block_idx().x) / tiles(); }
  DEVICE_FUNCTION int segment() const { return item() % p.chunks.segments; }
  DEVICE_FUNCTION int sequence_head() const { return item() / p.chunks.segments; }
  DEVICE_FUNCTION int count() const { return place.chunks.end - place.chunks.begin; }
  DEVICE_FUNCTION int chunk_at(int i) const {
    return kReverse ? place.chunks.end - 1 - i : place.chunks.begin + i;
  }
  DEVICE_FUNCTION int64_t slot_at(int i) const {
    return static_cast<int64_t>(place.head) * p.chunks.slots + place.range.first_slot + chunk_at(i);
  }
  DEVICE_FUNCTION int token_at(int i) const { return place.range.begin + chunk_at(i) * kLength; }
  DEVICE_FUNCTION int rows_at(int i) const {
    const int left = place.range.length - chunk_at(i) * kLength;
    return left < kLength ? left : kLength;
  }

  const SweepParams& p;
  const SweepSm90Params& maps;
  Shared& s;
  const SweepSm90Place& place;

 private:
  DEVICE_FUNCTION SweepSm90Place find_place() const {
    SweepSm90Place found;
    found.tile = static_cast<int>(prim::block_idx().x) % tiles();
    const int sequence = sequence_head() / p.chunks.num_heads;
    found.head = sequence_head() - sequence * p.chunks.num_heads;
    found.range = sequence_at(p.chunks, sequence);
    found.chunks = segment_at(p.chunks, found.range, segment());
    found.columns = p.x.width - found.tile * kDX;
    return found;
  }

  template <int kCols, int kSlots>
  DEVICE_FUNCTION void load_half(const prim::TensorMap& map,
                                 StripTile<kBoxRows, kCols> (&slots)[kSlots], Ring<kSlots, 8>& ring,
                                 int first_use, int half, int i, int col) {
    const int use = first_use + half;
    u64* bar = ring.fill(use, kCols / kStripColumns * kBoxBytes);
    load_box_tile(slots[ring.slot(use)], map, col, place.head, token_at(i) + half * kBoxRows,
                  place.range.batch, bar);
  }
};

}  // namespace xlstm::cuda
