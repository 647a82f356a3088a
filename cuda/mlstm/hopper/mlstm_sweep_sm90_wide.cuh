#pragma once
// The fused mLSTM sweep for sm_90a that contracts over up to 256 columns, with chunks of 64 tokens:
//   Out = [mask(A B^T * D)] X + outer * (A S)        S <- gamma S + B^T (inner * X)
// Three warpgroups: one thread of the first loads; each of the others has 64 columns of X and Out and all rows of S to
// itself, in 128 registers per thread. They share what is loaded of A and B, both compute A B^T, and never wait for each
// other, so that the products of one run beside the exponentials of the other. Per chunk a consumer
//   publishes S and n (bfloat16) and inner * X
//   A B^T;  n and S of the next chunk, while P is made of A B^T
//   A S, weighed;  P X;  multiplies with q or k, stores
// A S comes late: its registers were those of A B^T.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_output.cuh"

namespace xlstm::cuda {

struct SweepSm90WideShared {
  static constexpr int kLength = kSweepSm90WideLength,
                       kContraction = kSweepSm90WideTile.contraction,
                       kColumns = kSweepSm90WideTile.columns;
  static constexpr int kAbSlots = 7, kXSlots = 3, kGateSlots = 2;
  // Loading is less than two chunks, of four tiles of A and B each, ahead of either consumer. A slot of x, which changes
  // hands, could else be two uses ahead of who waits for it, and a barrier's parity tells but one.
  static_assert(kAbSlots < 8);

  StripTile<kLength, kContraction / 2> ab[kAbSlots];  ///< halves of the columns
  StripTile<kLength, kColumns> x[kXSlots];
  StripTile<kLength, kColumns> weighted[2];  ///< inner * X, by consumer as what follows
  StripTile<kContraction, kColumns> state[2];
  SideRows<kLength> weights[2];  ///< of the tokens in n
  alignas(16) GateRecord records[kGateSlots][kLength];
  alignas(16) float z[kGateSlots][kLength];
  float n[2][kColumns];
  Ring<kAbSlots, 8> ab_ring;
  Ring<kXSlots, 4> x_ring;  ///< uses alternate between the consumers
  Ring<kGateSlots, 8> gate_ring;
  SweepSm90Place place;
};

/// A block whose consumers have columns of X of their own and all tokens.
template <Use kUse>
class SweepSm90WideBlock
    : public SweepSm90Places<kUse, 2 * SweepSm90WideShared::kColumns, kSweepSm90WideLength> {
 public:
  using Shared = SweepSm90WideShared;
  using Places = SweepSm90Places<kUse, 2 * Shared::kColumns, kSweepSm90WideLength>;
  static constexpr Use kOfUse = kUse;
  static constexpr int kLength = kSweepSm90WideLength, kDA = Shared::kContraction,
                       kDX = Shared::kColumns;
  static constexpr bool kOwnColumns = true;
  static_assert(kUse == Use::kDq || kUse == Use::kDk, "n has a number per column of X");

  DEVICE_FUNCTION SweepSm90WideBlock(const SweepSm90Params& params, Shared& shared)
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
      prim::fence_mbar_init();
    }
    for (int i = thread; i < kLength * 8; i += kSweepSm90Threads)
      s.weights[0].data[i].bits = s.weights[1].data[i].bits = 0;
    this->clear_z(s, thread);
  }

  /// One thread: the loads of all chunks, as slots become free.
  DEVICE_FUNCTION void load_chunks() {
    for (int i = 0; i < this->count(); ++i) {
      this->load_gates(s, i);
      for (int half = 0; half < 2; ++half)
        load(maps.a, s.ab, s.ab_ring, 4 * i + half, i, half * kDA / 2);
      for (int half = 0; half < 2; ++half)
        load(maps.b, s.ab, s.ab_ring, 4 * i + 2 + half, i, half * kDA / 2);
      for (int consumer = 0; consumer < 2; ++consumer)
        load(maps.x, s.x, s.x_ring, 2 * i + consumer, i, place.column + consumer * kDX);
    }
  }

 protected:
  using Places::maps;
  using Places::place;

  DEVICE_FUNCTION StripTile<kDA, kDX>& published_state(int consumer) { return s.state[consumer]; }
  DEVICE_FUNCTION float* published_n(int consumer) { return s.n[consumer]; }

  Shared& s;

 private:
  template <int kCols, int kSlots, int kWarps>
  DEVICE_FUNCTION void load(const prim::TensorMap& map, StripTile<kBoxRows, kCols> (&slots)[kSlots],
                            Ring<kSlots, kWarps>& ring, int use, int i, int col) {
    u64* bar = ring.fill(use, kCols / kStripColumns * kBoxBytes);
    load_box_tile(slots[ring.slot(use)], map, col, place.head, this->token_at(i), place.range.batch,
                  bar);
  }
};

template <Use kUse>
class SweepSm90WideConsumer : public SweepSm90Output<SweepSm90WideBlock<kUse>> {
 public:
  using Base = SweepSm90Output<SweepSm90WideBlock<kUse>>;
  using Base::Base;

  DEVICE_FUNCTION void run() {
    this->load_state();
    for (int i = 0; i < this->count(); ++i) {
      if constexpr (kUse == Use::kDq) this->leave_anchor(this->chunk_at(i));
      chunk(i);
      if constexpr (kUse == Use::kDk) this->dot_anchor(this->chunk_at(i));
    }
    this->store_state();
  }

 private:
  using Base::consumer;
  using Base::kDA;
  using Base::kDX;
  using Base::kLength;
  using Base::kStateBlocks;
  using Base::n;
  using Base::p;
  using Base::records_at;
  using Base::s;
  using Base::state;
  using Base::thread;
  using Base::z_at;
  using typename Base::DotPieces;
  using typename Base::Fragments;
  using typename Base::OutTile;
  using typename Base::ScoreTile;

  // Slots of the chunk.
  using AbTile = StripTile<kLength, kDA / 2>;
  using XTile = StripTile<kLength, kDX>;
  DEVICE_FUNCTION AbTile& a_at(int i, int half) { return s.ab[s.ab_ring.slot(4 * i + half)]; }
  DEVICE_FUNCTION AbTile& b_at(int i, int half) { return s.ab[s.ab_ring.slot(4 * i + 2 + half)]; }
  DEVICE_FUNCTION XTile& x_at(int i) { return s.x[s.x_ring.slot(2 * i + consumer)]; }

  /// This warpgroup alone.
  DEVICE_FUNCTION void meet() const { prim::named_sync(2 + static_cast<u32>(consumer), 128); }

  DEVICE_FUNCTION void chunk(int i) {
    this->forget_addresses();
    const float gamma = p.gamma[this->slot_at(i)];
    enter_chunk(i);
    this->decay_state(gamma);
    Fragments fragments;
    {
      ScoreTile scores;
      start_products(i, scores);
      this->forget_addresses();
      float sums[2] = {};
      this->finish_scores(i, 0, scores, fragments, sums);
    }
    this->forget_addresses();
    finish_products(i, fragments);
  }

  /// Publishes what this warpgroup's products of the chunk take, once those of the chunk before are done.
  DEVICE_FUNCTION void enter_chunk(int i) {
    s.gate_ring.wait(i);
    // Of both consumers: a slot changes hands, and a wait for one of its phases must not be mistaken for an earlier one's.
    s.x_ring.wait(2 * i);
    s.x_ring.wait(2 * i + 1);
    meet();
    this->publish_state();
    const int rows = this->rows_at(i);
    // Beyond the tensor the copy engine delivers zeros; beyond a packed sequence, tokens of the next one.
    const bool tail = p.chunks.cu_seqlens != nullptr && rows < kLength;
    publish_weighted(i, tail ? rows : kLength);
    if (tail) clear_tail(i, rows);
    prim::fence_proxy_async();
    meet();
  }

  /// inner * X, and the weights of n; rows of X from `rows` on become zero, since a weight of 0 does not keep out inf and
  /// NaN.
  DEVICE_FUNCTION void publish_weighted(int i, int rows) {
    const GateRecord* records = records_at(i);
    if (thread < kLength)
      s.weights[consumer].set(thread,
                              this->n_weight(this->inner(records[thread]), z_at(i)[thread]));
    const int col = thread % 8 * 8;
#pragma unroll
    for (int j = 0; j < kLength / 16; ++j) {
      const int row = thread / 8 + 16 * j;
      Bytes16& from = *reinterpret_cast<Bytes16*>(x_at(i).piece(row, col));
      if (row >= rows) from = {};
      const float weight = this->inner(records[row]);
      Bytes16 piece = from;
#pragma unroll
      for (u32& pair : piece.words)
        pair = prim::pack_bf16x2(weight * low_half(pair), weight * high_half(pair));
      *reinterpret_cast<Bytes16*>(s.weighted[consumer].piece(row, col)) = piece;
    }
  }
  /// The same for B: each consumer takes half of the columns.
  DEVICE_FUNCTION void clear_tail(int i, int rows) {
    s.ab_ring.wait(4 * i + 2 + consumer);
    AbTile& b = b_at(i, consumer);
    for (int row = rows + thread / 16; row < kLength; row += 8)
      *reinterpret_cast<Bytes16*>(b.piece(row, thread % 16 * 8)) = Bytes16{};
    prim::fence_proxy_async();
    prim::named_sync(1, 256);
  }

  /// scores = A B^T; then, still under way at the end, n += (weights * X) and S += B^T (inner * X).
  DEVICE_FUNCTION void start_products(int i, ScoreTile& scores) {
#pragma unroll
    for (int use = 0; use < 4; ++use) s.ab_ring.wait(4 * i + use);
    fence_state();
    prim::wgmma_fence();
    const Strips a[2] = {strips_of(a_at(i, 0)), strips_of(a_at(i, 1))};
    const Strips b[2] = {strips_of(b_at(i, 0)), strips_of(b_at(i, 1))};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiply_tiles<64, false, false, kDA / 2>(scores, a[half], b[half], half > 0);
    prim::wgmma_commit();
    const Strips x = strips_of(x_at(i)), weighted = strips_of(s.weighted[consumer]);
#pragma unroll
    for (int k = 0; k < kLength; k += 16)
      prim::wgmma_bf16<8, true, false>(n, x.mn_major(k), s.weights[consumer].descriptor(k), true);
#pragma unroll
    for (int block = 0; block < kStateBlocks; ++block)
      multiply_tiles<kDX, true, true, kLength>(state[block], b[block / 2].from(0, block % 2),
                                               weighted, true);
    prim::wgmma_commit();
    prim::wgmma_wait<1>();
    prim::fence_registers(scores);
  }

  /// out = outer (A S + z n) + P X, and all that is left of the chunk.
  DEVICE_FUNCTION void finish_products(int i, Fragments& fragments) {
    OutTile out;
    const u32 zero = zero_after(fragments);
    prim::wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiply_tiles<kDX, false, true, kDA / 2>(
          out, strips_of(a_at(i, half)).shifted(zero),
          strips_of(s.state[consumer]).from(half * kDA / 2, 0), half > 0);
    prim::wgmma_commit();
    prim::wgmma_wait<0>();
    prim::fence_registers(out);
    fence_state();
    prim::sync_warp();
#pragma unroll
    for (int use = 0; use < 4; ++use) s.ab_ring.release(4 * i + use);
    this->scale_rows(i, out);
    this->keep(fragments);
    prim::fence_registers(out);
    prim::wgmma_fence();
    multiply_fragments<kDX, true>(out, fragments, strips_of(x_at(i)));
    prim::wgmma_commit();
    DotPieces dots;
    this->load_dots(i, dots);
    prim::wgmma_wait<0>();
    this->keep(fragments);
    prim::fence_registers(out);
    this->write_dots(i, out, dots);
    prim::fence_proxy_async();  // what was read here and not by wgmma is overwritten by copies
    prim::sync_warp();
    s.x_ring.release(2 * i + consumer);
    s.gate_ring.release(i);
    this->store(i, out);
  }

  /// Zero, but the compiler cannot know. Without such a dependency it starts A S before P is made, where the registers of
  /// both do not fit.
  static DEVICE_FUNCTION u32 zero_after(const Fragments& fragments) {
    u32 any = 0;
#pragma unroll
    for (const auto& fragment : fragments)
#pragma unroll
      for (const u32 word : fragment) any |= word;
    return any & prim::block_idx().y;  // the grid has one dimension
  }

  DEVICE_FUNCTION void fence_state() {
#pragma unroll
    for (int block = 0; block < kStateBlocks; ++block) prim::fence_registers(state[block]);
    prim::fence_registers(n);
  }
};

template <Use kUse>
KERNEL_FUNCTION(kSweepSm90Threads, 1)
mlstm_sweep_sm90_wide(const GRID_CONSTANT SweepSm90Params p) {
#if PRIM_HAS_SM90A
  auto& shared = *reinterpret_cast<SweepSm90WideShared*>(prim::dynamic_shared());
  SweepSm90WideBlock<kUse> block(p, shared);
  block.prepare();
  prim::sync_block();
  if (warpgroup_here() == 0) {
    prim::set_max_registers_down<24>();
    if (prim::thread_idx().x == 0) block.load_chunks();
  } else {
    prim::set_max_registers_up<240>();
    SweepSm90WideConsumer<kUse>(p, shared).run();
  }
#else
  prim::wgmma_fence();  // traps
#endif
}

}  // namespace xlstm::cuda
