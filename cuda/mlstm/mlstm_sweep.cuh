#pragma once
// The fused mLSTM sweep: all chunks of a segment in one block, the state never leaves the chip.
//   Out = [mask(A B^T * D)] X + outer * (A S)        S <- gamma S + (inner * B)^T X
// with A, B of 64 x kDA and a tile of kDX columns of X per block; what A, B, X are: Use in mlstm_params.h.
//
// S is float32 in registers and is published to shared memory as bfloat16 planes once per chunk. Eight warps: 2 x 4 over
// the rows and columns of Out and of A B^T, 4 x 2 over those of S; these grids read the fewest fragments. Per chunk:
//   publish S, wait for the chunk's loads             -- barrier --   (start the next chunk's loads, two stages)
//   A S and A B^T, P to shared memory                 -- barrier --
//   P X, update of S, store Out                       -- barrier --   (start the next chunk's loads, one stage)
#include "cuda/mlstm/mlstm_sweep_output.cuh"

namespace xlstm::cuda {

template <Use kUse, int kDA, int kDX, int kPlanes>
class Sweep : public SweepOutput<kUse, kDA, kDX, kPlanes> {
 public:
  using Base = SweepOutput<kUse, kDA, kDX, kPlanes>;
  using Base::Base;
  using typename Base::Shared;
  using typename Base::Stage;

  DEVICE_FUNCTION void run() {
    const int count = chunks.end - chunks.begin;
    clear_shared();
    if (count > 0) load(0);
    load_state();
    for (int i = 0; i < count; ++i) {
      const float gamma = p.gamma[slot_at(i)];
      if constexpr (kUse == Use::kDq) leave_anchor(chunk_at(i));
      publish_state();
      prim::cp_async_wait<0>();
      prim::sync_block();
      if (p.stages == 2 && i + 1 < count) load(i + 1);
      if (kTransposed && i > 0) write_dots(i - 1);
      chunk(i, gamma, i + 1 < count);
      if constexpr (kUse == Use::kDk) dot_anchor(chunk_at(i));
    }
    if (kTransposed && count > 0) {
      prim::sync_block();
      write_dots(count - 1);
    }
    store_state();
  }

 private:
  using typename Base::DotTile;
  using typename Base::OutTile;
  using ScoreTile = float[2][2][4];
  using Base::add_products;
  using Base::chunk_at;
  using Base::chunks;
  using Base::clear_shared;
  using Base::columns;
  using Base::depth;
  using Base::dot_anchor;
  using Base::kHasN;
  using Base::kOutTiles;
  using Base::kReverse;
  using Base::kTransposed;
  using Base::leave_anchor;
  using Base::load;
  using Base::load_dots;
  using Base::load_state;
  using Base::normalize;
  using Base::out_row;
  using Base::p;
  using Base::publish_state;
  using Base::publish_sums;
  using Base::s;
  using Base::scale_rows;
  using Base::score_column;
  using Base::slot_at;
  using Base::stage_at;
  using Base::store;
  using Base::store_state;
  using Base::sum_dots;
  using Base::thread;
  using Base::update_n;
  using Base::update_state;
  using Base::warp;
  using Base::write_dots;
  using Base::write_weights;

  // One chunk -----------------------------------------------------------------------------------------------------------
  DEVICE_FUNCTION void chunk(int i, float gamma, bool more) {
    Stage& stage = stage_at(i);
    OutTile out = {};
    {
      ScoreTile scores = {};
      multiply(stage, out, scores);
      finish_scores(stage, scores);
    }
    scale_rows(stage, out);
    if constexpr (kHasN) write_weights(stage);
    prim::sync_block();
    DotTile dots;
    if constexpr (kTransposed) load_dots(i, dots);
    if (warp % 4 * (kDX / 4) < columns) add_products(stage, out);
    update_state(stage, gamma);
    if constexpr (kUse == Use::kH) {
      update_n(stage.b, gamma);
      normalize(i, stage, out);
    } else if constexpr (kTransposed) {
      update_n(stage.x, gamma);
      sum_dots(out, dots);
    }
    if (p.stages == 1 && more) {
      prim::sync_block();
      load(i + 1);
    }
    store(i, out);
  }

  /// out = A S, scores = A B^T
  DEVICE_FUNCTION void multiply(Stage& stage, OutTile& out, ScoreTile& scores) {
    if (depth == kDA) {
#pragma unroll
      for (int k0 = 0; k0 < kDA; k0 += 16) multiply_step(stage, k0, out, scores);
    } else {
#pragma unroll 1
      for (int k0 = 0; k0 < depth; k0 += 16) multiply_step(stage, k0, out, scores);
    }
  }

  DEVICE_FUNCTION void multiply_step(Stage& stage, int k0, OutTile& out, ScoreTile& scores) {
    u32 a[2][kPlanes][4], b[kPlanes][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) fragment_a(a[m], stage.a, warp / 4 * 32 + 16 * m, k0);
#pragma unroll
    for (int t = 0; t < kOutTiles; t += 2) {
      fragment_b_transposed(b, s.state, warp % 4 * (kDX / 4) + 8 * t, k0);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add(out[m][t], a[m], b, 0);
        multiply_add(out[m][t + 1], a[m], b, 2);
      }
    }
    fragment_b(b, stage.b, warp % 4 * 16, k0);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      multiply_add(scores[m][0], a[m], b, 0);
      multiply_add(scores[m][1], a[m], b, 2);
    }
  }

  /// P = scale (scores + z) D to shared memory; with kH also the row sums that make up the normaliser's product.
  DEVICE_FUNCTION void finish_scores(Stage& stage, ScoreTile& scores) {
    float sums[2][2] = {};
    // Read before the stores to P, which could alias.
    const GateRecord* at = &stage.records[score_column(0)];
    const GateRecord others[2][2] = {{at[0], at[1]}, {at[8], at[9]}};
    float z[2][2] = {};
    if constexpr (kUse == Use::kDk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) z[i / 2][i % 2] = stage.z[score_column(i / 2) + i % 2];
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = out_row(m, half);
        const GateRecord gates = stage.records[row];
        const float z_row = kUse == Use::kDq ? stage.z[row] : 0.0F;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          float values[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int col = score_column(t) + e;
            const float d = kReverse ? decay(others[t][e], col, gates, row)
                                     : decay(gates, row, others[t][e], col);
            float score = scores[m][t][2 * half + e];
            if constexpr (kUse == Use::kDq) score += z_row;
            if constexpr (kUse == Use::kDk) score += z[t][e];
            values[e] = score * (p.scale * d);
            if constexpr (kUse == Use::kH) sums[m][half] += values[e];
          }
          store_pair(s.p, row, score_column(t), values[0], values[1]);
        }
      }
    if constexpr (kUse == Use::kH) {
      add_normaliser(stage, sums);
      publish_sums(sums);
    }
  }

  /// sums[row] += w_row (q_row . n) over this warp's quarter of the contraction; a quad's sum is the whole.
  DEVICE_FUNCTION void add_normaliser(Stage& stage, float (&sums)[2][2]) {
    const int l = thread % 32;
    float products[2][4] = {};
#pragma unroll
    for (int step = 0; step < kDA / 64; ++step) {
      const int k0 = warp % 4 * (kDA / 4) + 16 * step;
      u32 b[2];
      prim::ldmatrix_x2_trans(b, s.n_parts[k0 + l % 16]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        u32 a[kPlanes][4];
        fragment_a(a, stage.a, warp / 4 * 32 + 16 * m, k0);
#pragma unroll
        for (int plane = kPlanes - 1; plane >= 0; --plane)
          prim::mma_bf16(products[m], a[plane], b[0], b[1]);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        sums[m][half] +=
            stage.records[out_row(m, half)].w * (products[m][2 * half] + products[m][2 * half + 1]);
  }
};

template <Use kUse, int kDA, int kDX, int kPlanes>
KERNEL_FUNCTION(256, 1)
mlstm_sweep(const GRID_CONSTANT SweepParams p) {
  using Kernel = Sweep<kUse, kDA, kDX, kPlanes>;
  Kernel(p, *reinterpret_cast<typename Kernel::Shared*>(prim::dynamic_shared())).run();
}

}  // namespace xlstm::cuda
