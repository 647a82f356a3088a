#pragma once
// The state S and the vector n of a block of the sweep: in float32 registers, published to shared memory once per chunk.
#include "cuda/mlstm/mlstm_sweep_block.cuh"

namespace xlstm::cuda {

template <Use kUse, int kDA, int kDX, int kPlanes>
class SweepState : public SweepBlock<kUse, kDA, kDX, kPlanes> {
 public:
  using Base = SweepBlock<kUse, kDA, kDX, kPlanes>;
  using Base::Base;
  using typename Base::Stage;

 protected:
  using Base::columns;
  using Base::depth;
  using Base::group;
  using Base::head;
  using Base::inner;
  using Base::item;
  using Base::kHasN;
  using Base::kNWidth;
  using Base::kReverse;
  using Base::kStateRows;
  using Base::kStateTiles;
  using Base::kThreads;
  using Base::kTransposed;
  using Base::n_column;
  using Base::p;
  using Base::quad;
  using Base::range;
  using Base::s;
  using Base::segment;
  using Base::sequence_head;
  using Base::state_column;
  using Base::state_row;
  using Base::thread;
  using Base::tile;
  using Base::warp;

  // The state -----------------------------------------------------------------------------------------------------------
  /// Calls f(number, offset in a (DQK,DV) matrix) for the numbers of S that exist.
  template <class F>
  DEVICE_FUNCTION void for_state(F f) {
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = state_row(m, i / 2), col = state_column(t) + i % 2;
          if (row >= p.a.width || col >= columns) continue;
          const int x = tile * kDX + col;
          f(state[m][t][i], kTransposed ? static_cast<int64_t>(x) * p.dv + row
                                        : static_cast<int64_t>(row) * p.dv + x);
        }
  }
  /// Likewise f(number, offset in a (DQK) vector) for n.
  template <class F>
  DEVICE_FUNCTION void for_n(F f) {
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = n_column(c) + e;
        if (col < (kTransposed ? columns : p.a.width)) f(n[c][e], kTransposed * tile * kDX + col);
      }
  }

  DEVICE_FUNCTION void load_state() {
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[m][t][i] = 0;
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c) n[c][0] = n[c][1] = 0;
    if (p.start_c != nullptr) {
      const float* start = p.start_c + static_cast<int64_t>(item()) * p.dqk * p.dv;
      for_state([start](float& x, int64_t at) { x = start[at]; });
    }
    if (kHasN && p.start_n != nullptr) {
      const float* start = p.start_n + static_cast<int64_t>(item()) * p.dqk;
      for_n([start](float& x, int at) { x = start[at]; });
    }
  }

  DEVICE_FUNCTION void store_state() {
    if (segment() != (kReverse ? 0 : p.chunks.segments - 1)) return;
    if (p.end_c != nullptr) {
      float* end = p.end_c + static_cast<int64_t>(sequence_head()) * p.dqk * p.dv;
      for_state([end](float x, int64_t at) { end[at] = x; });
    }
    // Eight lanes hold the same numbers of n, and with kH all tiles do.
    if (kHasN && p.end_n != nullptr && group == 0 && (kTransposed || tile == 0)) {
      float* end = p.end_n + static_cast<int64_t>(sequence_head()) * p.dqk;
      for_n([end](float x, int at) { end[at] = x; });
    }
  }

  // Anchors -------------------------------------------------------------------------------------------------------------
  static constexpr int kAnchorNumbers = sweep_anchor_numbers({kDA, kDX, kPlanes});
  /// Calls f(number, place among the anchor's numbers) for the registers of S and n.
  template <class F>
  DEVICE_FUNCTION void for_registers(F f) {
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(state[m][t][i], ((m * kStateTiles + t) * 4 + i) * kThreads + thread);
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        f(n[c][e], (kStateRows * kStateTiles * 4 + 2 * c + e) * kThreads + thread);
  }

  /// kDq, before a chunk: leaves the state there if an anchor lies at its start.
  DEVICE_FUNCTION void leave_anchor(int chunk) {
    const int64_t anchor = anchor_of(chunk);
    if (anchor < 0) return;
    float* to = p.anchors.states + anchor * kAnchorNumbers;
    for_registers([to](float x, int at) { to[at] = x; });
  }
  /// kDk, after the same chunk: <C, dC> + <n, dn>.
  DEVICE_FUNCTION void dot_anchor(int chunk) {
    const int64_t anchor = anchor_of(chunk);
    if (anchor < 0) return;
    const float* from = p.anchors.states + anchor * kAnchorNumbers;
    constexpr int kStateNumbers = kDA * kDX;
    const bool counts_n = group == 0;  // the other lanes hold copies
    float sum = 0;
    for_registers([&](float x, int at) {
      if (at < kStateNumbers || counts_n) sum += x * from[at];
    });
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) sum = plus_lane(sum, lanes);
    if (thread % 32 == 0) p.anchors.dots[anchor * kAnchorWarps + warp] = sum;
  }
  /// Number of the anchor among all blocks' ones; -1: none.
  DEVICE_FUNCTION int64_t anchor_of(int chunk) const {
    const int anchor = p.anchors.states == nullptr ? -1 : anchor_at(p.chunks, range, chunk);
    if (anchor < 0) return -1;
    return (int64_t{tile} * p.chunks.num_heads + head) * p.anchors.count + anchor;
  }

  DEVICE_FUNCTION void publish_state() {
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          store_pair(s.state, state_row(m, half), state_column(t), state[m][t][2 * half],
                     state[m][t][2 * half + 1]);
    if constexpr (kHasN) {
      if (group == 0) publish_n();
    }
  }

  DEVICE_FUNCTION void publish_n() {
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = n_column(c) + e;
        if constexpr (kTransposed) {
          s.n[col] = n[c][e];
        } else {
          bf16 parts[3];
          split_exactly(n[c][e], parts);
          const Bytes16 row = {
              {parts[0].bits | static_cast<u32>(parts[1].bits) << 16, parts[2].bits, 0, 0}};
          *reinterpret_cast<Bytes16*>(s.n_parts[col]) = row;
        }
      }
  }

  DEVICE_FUNCTION void update_state(Stage& stage, float gamma) {
    const int first_row = warp / 2 * kStateRows * 16, first_column = warp % 2 * (kDX / 2);
    if (first_row >= depth || first_column >= columns) return;
#pragma unroll
    for (int m = 0; m < kStateRows; ++m)
#pragma unroll
      for (int t = 0; t < kStateTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[m][t][i] *= gamma;
#pragma unroll
    for (int k0 = 0; k0 < 64; k0 += 16) {
      const GateRecord* records = &stage.records[k0 + 2 * quad];
      const float weights[4] = {inner(records[0]), inner(records[1]), inner(records[8]),
                                inner(records[9])};
      u32 a[kStateRows][kPlanes][4];
#pragma unroll
      for (int m = 0; m < kStateRows; ++m) {
        fragment_a_transposed(a[m], stage.b, first_row + 16 * m, k0);
        scale_columns(a[m], weights);
      }
#pragma unroll
      for (int t = 0; t < kStateTiles; t += 2) {
        u32 b[kPlanes][4];
        fragment_b_transposed(b, stage.x, first_column + 8 * t, k0);
#pragma unroll
        for (int m = 0; m < kStateRows; ++m) {
          multiply_add(state[m][t], a[m], b, 0);
          multiply_add(state[m][t + 1], a[m], b, 2);
        }
      }
    }
  }

  // The vector n --------------------------------------------------------------------------------------------------------
  /// Parts of the weight that a token has in n.
  DEVICE_FUNCTION void write_weights(Stage& stage) {
    if (thread >= 64) return;
    float weight = inner(stage.records[thread]);
    if constexpr (kUse == Use::kDk) weight *= stage.z[thread];
    bf16 parts[3];
    split_exactly(weight, parts);
#pragma unroll
    for (int i = 0; i < 3; ++i) *s.weights.at(0, i, thread) = parts[i];
  }

  /// n <- gamma n + sum of weighted rows; a warp has 8 of every 64 columns, every lane the sums of its quad's columns.
  DEVICE_FUNCTION void update_n(Tile<64, kNWidth, kPlanes>& rows, float gamma) {
    const int l = thread % 32;
    u32 w[2][4];
    prim::ldmatrix_x4(w[0], s.weights.at(0, l % 8, 8 * (l / 8)));
    prim::ldmatrix_x4(w[1], s.weights.at(0, l % 8, 32 + 8 * (l / 8)));
#pragma unroll
    for (int c = 0; c < kNWidth / 64; ++c) {
      float sums[4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 near[4] = {w[h][0], 0, w[h][1], 0}, far[4] = {w[h][2], 0, w[h][3], 0};
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          u32 b[4];
          prim::ldmatrix_x4_trans(b, rows.at(plane, 32 * h + l, 64 * c + 8 * warp));
          prim::mma_bf16(sums, near, b[0], b[1]);
          prim::mma_bf16(sums, far, b[2], b[3]);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e)  // the three parts lie in groups 0 to 2
        n[c][e] = gamma * n[c][e] + plus_lane(plus_lane(plus_lane(sums[e], 4), 8), 16);
    }
  }

  float state[kStateRows][kStateTiles][4];
  float n[kNWidth / 64][2];  ///< n_column(c) and the next, alike in all groups
};

}  // namespace xlstm::cuda
