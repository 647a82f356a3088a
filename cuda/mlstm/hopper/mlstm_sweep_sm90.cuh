#pragma once
// The fused mLSTM sweep for sm_90a: all chunks of a segment in one block, the state never leaves the chip.
//   Out = [mask(A B^T * D)] X + outer * (A S)        S <- gamma S + (inner * B)^T X
// as in mlstm_sweep.cuh, with chunks of 128 tokens. Three warpgroups: one thread of the first loads half chunks of A, B
// and X into rings of slots by tensor copies; each of the others computes 64 rows of Out and, in accumulators that stay in
// registers, 64 rows of S (a contraction of 64: one of them all of S). Per chunk a consumer
//   publishes S and n (bfloat16), and waits for the other's
//   A S, A B^T of its own half, q . n, n;  (inner * B)^T X into S, while P of its own half is made of A B^T
//   P X of its own half, and of the other half where the mask lets anything through
//   normalises or multiplies with q or k, and stores.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_output.cuh"

namespace xlstm::cuda {

template <Use kUse, int kDA, int kDX, int kConsumer>
class SweepSm90Consumer : public SweepSm90Output<SweepSm90Block<kUse, kDA, kDX>, kConsumer> {
 public:
  using Base = SweepSm90Output<SweepSm90Block<kUse, kDA, kDX>, kConsumer>;
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
  using Base::kLate;
  using Base::kLength;
  using Base::kNRow;
  using Base::kOwnsN;
  using Base::kOwnsState;
  using Base::kReverse;
  using Base::kTransposed;
  using Base::n;
  using Base::p;
  using Base::quad;
  using Base::records_at;
  using Base::row_of;
  using Base::s;
  using Base::state;
  using Base::thread;
  using Base::warp;
  using Base::z_at;
  using typename Base::DotPieces;
  using typename Base::Fragments;
  using typename Base::OutTile;
  using typename Base::ScoreTile;

  static constexpr int kOther = 1 - kConsumer;

  // Slots of the chunk.
  using AbTile = StripTile<kBoxRows, kDA>;
  using XTile = StripTile<kBoxRows, kDX>;
  DEVICE_FUNCTION AbTile& ab_at(int use) { return s.ab[s.ab_ring.slot(use)]; }
  DEVICE_FUNCTION AbTile& b_at(int i, int half) { return ab_at(4 * i + 2 + half); }
  DEVICE_FUNCTION XTile& x_at(int i, int half) { return s.x[s.x_ring.slot(2 * i + half)]; }

  // One chunk -----------------------------------------------------------------------------------------------------------
  DEVICE_FUNCTION void chunk(int i) {
    const float gamma = p.gamma[this->slot_at(i)];
    enter_chunk(i);
    this->decay_state(gamma);
    OutTile out;
    float sums[2] = {};
    Fragments fragments;
    {
      ScoreTile scores;
      Fragments update;
      multiply(i, out, scores, sums, update);
      this->scale_rows(i, out);
      if constexpr (kUse == Use::kDk || (kUse == Use::kDq && kDA == 64)) this->forget_addresses();
      arrive(&s.state_free);
      this->finish_scores(i, 64 * kConsumer, scores, fragments, sums);
      if constexpr (kOwnsState) {
        prim::wgmma_wait<0>();
        prim::fence_registers(state[0]);
        this->keep(update);
      }
    }
    DotPieces dots;
    add_products(i, out, fragments, sums, dots);
    if constexpr (kUse == Use::kH) this->normalize(i, out, sums);
    if constexpr (kTransposed) this->write_dots(i, out, dots);
    prim::fence_proxy_async();
    prim::sync_warp();
    s.gate_ring.release(i);
    this->store(i, out);
  }

  DEVICE_FUNCTION void arrive(u64* bar) {
    prim::sync_warp();
    prim::mbar_arrive_warp(bar);
  }

  /// Publishes what the other warpgroup needs and waits for what it publishes.
  DEVICE_FUNCTION void enter_chunk(int i) {
    s.gate_ring.wait(i);
    if (i > 0) prim::mbar_wait(&s.state_free, static_cast<u32>(i - 1) & 1);
    this->publish_state();
    publish_weights(i);
    const int rows = this->rows_at(i);
    // Beyond the tensor the copy engine delivers zeros; beyond a packed sequence, tokens of the next one.
    if (p.chunks.cu_seqlens != nullptr && rows < kLength) clear_tail(i, rows);
    prim::fence_proxy_async();
    arrive(&s.state_ready);
    prim::mbar_wait(&s.state_ready, static_cast<u32>(i) & 1);
  }

  /// Weights of this warpgroup's tokens.
  DEVICE_FUNCTION void publish_weights(int i) {
    if (thread >= 64) return;
    const int token = 64 * kConsumer + thread;
    const float weight = this->inner(records_at(i)[token]);
    s.inner[i % 2][token].bits = prim::float_to_bf16(weight);
    if constexpr (Base::kHasN) s.weights.set(token, this->n_weight(weight, z_at(i)[token]));
  }

  /// (inner * B)^T of half a chunk, at this warp's rows of S.
  DEVICE_FUNCTION void load_fragments(int i, Fragments& fragments, AbTile& b, int half) {
    const u32* weights = reinterpret_cast<const u32*>(s.inner[i % 2]) + 32 * half + quad;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      fragment_a_transposed(fragments[j], b, Base::kStateRow + 16 * warp, 16 * j);
      const u32 near = weights[8 * j], far = weights[8 * j + 4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        fragments[j][r] = prim::mul_bf16x2(fragments[j][r], r < 2 ? near : far);
    }
  }

  /// Zeros in place of this warpgroup's rows of B and X from `rows` on: a weight of 0 does not keep out inf and NaN.
  DEVICE_FUNCTION void clear_tail(int i, int rows) {
    s.ab_ring.wait(4 * i + 2 + kConsumer);
    s.x_ring.wait(2 * i + kConsumer);
    const int first = rows < 64 * kConsumer ? 0 : rows - 64 * kConsumer;
    AbTile& b = b_at(i, kConsumer);
    XTile& x = x_at(i, kConsumer);
    for (int row = first + warp; row < 64; row += 4) {
      const int col = thread % 32 * 8;
      if (col < kDA) *reinterpret_cast<Bytes16*>(b.piece(row, col)) = Bytes16{};
      if (col < kDX) *reinterpret_cast<Bytes16*>(x.piece(row, col)) = Bytes16{};
    }
  }

  /// out = A S, scores = A B^T of the own half, sums = w q . n, n += (weights * rows); then, still under way at the end,
  /// S += (inner * B)^T X of the first half.
  DEVICE_FUNCTION void multiply(int i, OutTile& out, ScoreTile& scores, float (&sums)[2],
                                Fragments& update) {
    float products[4] = {};
    s.ab_ring.wait(4 * i + kConsumer);
    s.ab_ring.wait(4 * i + 2);
    s.ab_ring.wait(4 * i + 3);
    if constexpr (kOwnsState) load_fragments(i, update, b_at(i, 0), 0);
    s.x_ring.wait(2 * i);
    s.x_ring.wait(2 * i + 1);
    const Strips a = strips_of(ab_at(4 * i + kConsumer));
    if constexpr (kOwnsState) {
      this->keep(update);
      prim::fence_registers(state[0]);
    }
    prim::fence_registers(n);
    prim::wgmma_fence();
    multiply_tiles<kDX, false, true, kDA>(out, a, strips_of(s.state), false);
    multiply_tiles<64, false, false, kDA>(scores, a, strips_of(b_at(i, kConsumer)), false);
    if constexpr (kUse == Use::kH) {
#pragma unroll
      for (int k = 0; k < kDA; k += 16)
        prim::wgmma_bf16<8, false, false>(products, a.k_major(k), s.n_parts.descriptor(k), k > 0);
    }
    if constexpr (kOwnsN) add_to_n(i);
    prim::wgmma_commit();
    if constexpr (kOwnsState) {
      multiply_fragments<kDX, true>(state[0], update, strips_of(x_at(i, 0)));
      prim::wgmma_commit();
      prim::wgmma_wait<1>();
    } else {
      prim::wgmma_wait<0>();
    }
    prim::fence_registers(out);
    prim::fence_registers(scores);
    prim::fence_registers(products);
    prim::fence_registers(n);
    if constexpr (kUse == Use::kH) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sums[half] = records_at(i)[row_of(half)].w * (products[2 * half] + products[2 * half + 1]);
    }
  }

  DEVICE_FUNCTION void add_to_n(int i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Strips rows =
          (kTransposed ? strips_of(x_at(i, half)) : strips_of(b_at(i, half))).from(0, kNRow / 64);
#pragma unroll
      for (int k = 0; k < 64; k += 16)
        prim::wgmma_bf16<8, true, false>(n, rows.mn_major(k), s.weights.descriptor(64 * half + k),
                                         true);
    }
  }

  /// out += P X and S += (inner * B)^T X of the second half; releases the slots of the chunk.
  DEVICE_FUNCTION void add_products(int i, OutTile& out, Fragments& own, float (&sums)[2],
                                    DotPieces& dots) {
    Fragments update;
    if constexpr (kOwnsState) load_fragments(i, update, b_at(i, 1), 1);
    if constexpr (!kLate) release_ab(i);
    if constexpr (kOwnsState) this->keep(update);
    this->keep(own);
    prim::fence_registers(out);
    prim::wgmma_fence();
    if constexpr (!kLate) {
      add_own(i, out, own, update);
      if constexpr (kTransposed) this->load_dots(i, dots);
      finish_own(own, update);
    } else {
      ScoreTile scores;
      Fragments other;
      multiply_tiles<64, false, false, kDA>(scores, strips_of(ab_at(4 * i + kConsumer)),
                                            strips_of(b_at(i, kOther)), false);
      prim::wgmma_commit();
      add_own(i, out, own, update);
      prim::wgmma_wait<1>();
      prim::fence_registers(scores);
      release_ab(i);
      this->finish_scores(i, 64 * kOther, scores, other, sums);
      this->keep(other);
      prim::wgmma_fence();
      multiply_fragments<kDX, true>(out, other, strips_of(x_at(i, kOther)));
      prim::wgmma_commit();
      finish_own<1>(own, update);
      if constexpr (kTransposed) this->load_dots(i, dots);
      prim::wgmma_wait<0>();
      this->keep(other);
    }
    prim::fence_registers(out);
    prim::sync_warp();
    s.x_ring.release(2 * i);
    s.x_ring.release(2 * i + 1);
  }

  DEVICE_FUNCTION void add_own(int i, OutTile& out, Fragments& own, Fragments& update) {
    multiply_fragments<kDX, true>(out, own, strips_of(x_at(i, kConsumer)));
    if constexpr (kOwnsState)
      multiply_fragments<kDX, true>(state[0], update, strips_of(x_at(i, 1)));
    prim::wgmma_commit();
  }

  /// Waits for add_own, with kPending groups behind it.
  template <u32 kPending = 0>
  DEVICE_FUNCTION void finish_own(Fragments& own, Fragments& update) {
    prim::wgmma_wait<kPending>();
    this->keep(own);
    if constexpr (kOwnsState) {
      this->keep(update);
      prim::fence_registers(state[0]);
    }
  }

  DEVICE_FUNCTION void release_ab(int i) {
    prim::fence_proxy_async();  // what ldmatrix has read is overwritten by copies
    prim::sync_warp();
#pragma unroll
    for (int use = 0; use < 4; ++use) s.ab_ring.release(4 * i + use);
  }
};

template <Use kUse, int kDA, int kDX>
KERNEL_FUNCTION(kSweepSm90Threads, 1)
mlstm_sweep_sm90(const GRID_CONSTANT SweepSm90Params p) {
#if PRIM_HAS_SM90A
  using Block = SweepSm90Block<kUse, kDA, kDX>;
  auto& shared = *reinterpret_cast<typename Block::Shared*>(prim::dynamic_shared());
  const u32 warpgroup = prim::thread_idx().x / 128;
  Block block(p, shared);
  block.prepare();
  prim::sync_block();
  if (warpgroup == 0) {
    prim::set_max_registers_down<24>();
    if (prim::thread_idx().x == 0) block.load_chunks();
  } else if (warpgroup == 1) {
    prim::set_max_registers_up<240>();
    SweepSm90Consumer<kUse, kDA, kDX, 0>(p, shared).run();
  } else {
    prim::set_max_registers_up<240>();
    SweepSm90Consumer<kUse, kDA, kDX, 1>(p, shared).run();
  }
#else
  prim::wgmma_fence();  // traps
#endif
}

}  // namespace xlstm::cuda
