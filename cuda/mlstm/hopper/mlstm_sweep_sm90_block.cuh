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
  int column, head;  ///< the block's first column of X
  SequenceRange range;
  SegmentRange chunks;
};

/// What all threads of a block know: where it works. kColumns: columns of X of a block, kLength: tokens of a chunk.
template <Use kUse, int kColumns, int kLength>
class SweepSm90Places {
 public:
  static constexpr bool kReverse = kUse == Use::kDv || kUse == Use::kDk;
  static constexpr bool kTransposed = kUse == Use::kDq || kUse == Use::kDk;  ///< S = C^T
  static constexpr bool kHasN = kUse != Use::kDv;

  DEVICE_FUNCTION SweepSm90Places(const SweepSm90Params& params, const SweepSm90Place& block_place)
      : p(params.sweep), maps(params), place(block_place) {}

 protected:
  // The first four are asked for before and after the chunks: cheaper to work out again than to keep in registers.
  DEVICE_FUNCTION int blocks_per_item() const { return divide_up(p.x.width, kColumns); }
  DEVICE_FUNCTION int item() const {
    return static_cast<int>(prim::block_idx().x) / blocks_per_item();
  }
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
  DEVICE_FUNCTION SweepSm90Place find_place() const {
    SweepSm90Place found;
    found.column = static_cast<int>(prim::block_idx().x) % blocks_per_item() * kColumns;
    const int sequence = sequence_head() / p.chunks.num_heads;
    found.head = sequence_head() - sequence * p.chunks.num_heads;
    found.range = sequence_at(p.chunks, sequence);
    found.chunks = segment_at(p.chunks, found.range, segment());
    return found;
  }

  /// Loads of the chunk's gate records, and z.
  template <class Shared>
  DEVICE_FUNCTION void load_gates(Shared& s, int i) const {
    const bool with_z = kTransposed && p.z != nullptr;
    const int64_t position = slot_at(i) * kLength;
    constexpr u32 kRecordBytes = kLength * sizeof(GateRecord), kZBytes = kLength * sizeof(float);
    u64* bar = s.gate_ring.fill(i, kRecordBytes + (with_z ? kZBytes : 0));
    const int gate = s.gate_ring.slot(i);
    prim::bulk_load(s.records[gate], p.records + position, kRecordBytes, bar);
    if (with_z) prim::bulk_load(s.z[gate], p.z + position, kZBytes, bar);
  }
  /// Where there is no z it is zero.
  template <class Shared>
  DEVICE_FUNCTION void clear_z(Shared& s, int thread) const {
    if (kTransposed && p.z == nullptr && thread < kLength)
      for (int i = 0; i < Shared::kGateSlots; ++i) s.z[i][thread] = 0;
  }

  const SweepParams& p;
  const SweepSm90Params& maps;
  const SweepSm90Place& place;
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

/// A block whose consumers share its columns of X and have half of the tokens of a chunk each.
template <Use kUse, int kContraction, int kColumns>
class SweepSm90Block : public SweepSm90Places<kUse, kColumns, kSweepSm90Length> {
 public:
  using Places = SweepSm90Places<kUse, kColumns, kSweepSm90Length>;
  using Shared = SweepSm90Shared<kUse, kContraction, kColumns>;
  static constexpr Use kOfUse = kUse;
  static constexpr int kLength = kSweepSm90Length, kDA = kContraction, kDX = kColumns;
  static constexpr bool kOwnColumns = false;  ///< of a consumer

  DEVICE_FUNCTION SweepSm90Block(const SweepSm90Params& params, Shared& shared)
      : Places(params, shared.place), s(shared) {}

  /// All threads, before the block's first barrier.
  DEVICE_FUNCTION void prepare() {
    const int thread = static_cast<int>(prim::thread_idx().x);
    prim::require_aligned(&s, 1024);
    if (thread == 0) {
      s.place = this->find_place();
      s.ab_ring.init();
      s.x_ring.init();
      s.gate_ring.init();
      prim::mbar_init_warps(&s.state_ready, 8);
      prim::mbar_init_warps(&s.state_free, 8);
      prim::fence_mbar_init();
    }
    for (int i = thread; i < kLength * 8; i += kSweepSm90Threads) s.weights.data[i].bits = 0;
    for (int i = thread; i < kDA * 8; i += kSweepSm90Threads) s.n_parts.data[i].bits = 0;
    this->clear_z(s, thread);
  }

  /// One thread: the loads of all chunks, as slots become free.
  DEVICE_FUNCTION void load_chunks() {
    for (int i = 0; i < this->count(); ++i) {
      this->load_gates(s, i);
      for (int half = 0; half < 2; ++half) load_half(maps.a, s.ab, s.ab_ring, 4 * i, half, i, 0);
      for (int half = 0; half < 2; ++half)
        load_half(maps.b, s.ab, s.ab_ring, 4 * i + 2, half, i, 0);
      for (int half = 0; half < 2; ++half)
        load_half(maps.x, s.x, s.x_ring, 2 * i, half, i, place.column);
    }
  }

 protected:
  using Places::maps;
  using Places::place;

  DEVICE_FUNCTION StripTile<kDA, kDX>& published_state(int) { return s.state; }
  DEVICE_FUNCTION float* published_n(int) { return s.n; }

  Shared& s;

 private:
  template <int kCols, int kSlots>
  DEVICE_FUNCTION void load_half(const prim::TensorMap& map,
                                 StripTile<kBoxRows, kCols> (&slots)[kSlots], Ring<kSlots, 8>& ring,
                                 int first_use, int half, int i, int col) {
    const int use = first_use + half;
    u64* bar = ring.fill(use, kCols / kStripColumns * kBoxBytes);
    load_box_tile(slots[ring.slot(use)], map, col, place.head, this->token_at(i) + half * kBoxRows,
                  place.range.batch, bar);
  }
};

}  // namespace xlstm::cuda
