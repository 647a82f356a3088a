#pragma once
// The persistent forward kernel. A warp owns groups of 8 units. The rows of its two A tiles per group are ordered so that a
// thread's accumulators are the four gates of one unit (lane / 4) for its sequences 2 (lane % 4) + {0, 1}: what follows the
// product needs no other thread.
#include "cuda/slstm/slstm_exchange.cuh"
#include "cuda/slstm/slstm_gates.cuh"

namespace xlstm::cuda {

template <class Cell, class Exchange, int kGroups, int kPlanes>
class SlstmForwardBlock {
 public:
  static PRIM_FUNCTION constexpr SlstmKernelShape kernel() {
    return {kGroups, kPlanes, 1, Exchange::kBuffers, Exchange::kWithinBlock && kGroups == 1};
  }
  static constexpr int kResident = slstm_resident(kernel());
  /// Every other step has sums of its own where there are many: a product waits for the one before it into the same sums.
  static constexpr int kChains = kGroups == 1 && !kernel().small ? 2 : 1;

  DEVICE_FUNCTION SlstmForwardBlock(const SlstmForwardParams& params, unsigned char* shared)
      : p(params),
        s(params.shape),
        d(params.shape.division),
        rows(*reinterpret_cast<SlstmRow (*)[kSlstmRows]>(shared)),
        layout(slstm_shared(kernel(), d)),
        partials(reinterpret_cast<float*>(shared + layout.partials)),
        lane(static_cast<int>(prim::thread_idx().x % 32)),
        warp(static_cast<int>(prim::thread_idx().x / 32)),
        group(static_cast<int>(prim::block_idx().x) / d.blocks),
        rank(static_cast<int>(prim::block_idx().x) % d.blocks),
        head((group + d.first_group) / d.sequence_tiles),
        split(kGroups == 1 ? warp % d.splits : 0),
        exchange(slstm_space(kernel(), params.shape, layout, shared, group, rank)) {
    const int steps = slstm_steps(kernel(), d).all;
    first_step = split * steps;
    const int left = d.padded / 16 - first_step;
    my_steps = left < steps ? (left < 0 ? 0 : left) : steps;
    weights = reinterpret_cast<Bytes16*>(shared + layout.weights) +
              warp * (steps > kResident ? steps - kResident : 0) * (2 * kGroups * kPlanes * 32);
    // Groups of 8 units come in pairs: `padded` and `units` are multiples of 16.
    const int local = (kGroups == 1 ? warp / d.splits : 2 * warp) * kSlstmGroupUnits;
    column = rank * d.units + local;
    active = local < d.units && column < d.padded;
  }

  DEVICE_FUNCTION void run() {
    const int steps = read_rows();
    load_weights();
    exchange.begin(steps);
    start(steps);
    for (int t = 0; t < steps; ++t) {
      start_sums();
      if (t + 1 < steps) prefetch(t + 1);
      multiply(exchange.wait(t, active));
      if (kGroups == 1 && d.splits > 1) add_partials();
      if (active && split == 0) finish(t, steps);
    }
    exchange.end();
  }

 private:
  /// The sequences of this block; the longest sequence's tokens.
  DEVICE_FUNCTION int read_rows() {
    slstm_read_rows(s, group, rows);
    prim::sync_block();
    return slstm_longest(rows);
  }

  /// The type of wx and y.
  DEVICE_FUNCTION bool wide() const { return kPlanes == 2 && s.dtype == Dtype::kFloat32; }
  DEVICE_FUNCTION bool wide_gates() const { return s.gates_dtype == Dtype::kFloat32; }
  DEVICE_FUNCTION int unit_of(int g) const { return column + g * kSlstmGroupUnits + lane / 4; }
  DEVICE_FUNCTION bool owns(int g) const { return active && split == 0 && unit_of(g) < s.dh; }

  DEVICE_FUNCTION float weight(int gate, int unit, int k) const {
    if (unit >= s.dh || k >= s.dh) return 0;
    return load_number(s.in.r, ((int64_t{gate} * s.num_heads + head) * s.dh + unit) * s.dh + k,
                       s.r_dtype);
  }
  /// Half m of the A tiles of a group: gates 2 m and 2 m + 1.
  DEVICE_FUNCTION void make_fragment(u32 (&a)[kPlanes][4], int step, int g, int m) const {
    for (int r = 0; r < 4; ++r) {
      const int gate = 2 * m + r % 2, k = 16 * step + 2 * (lane % 4) + 8 * (r / 2);
      u32 planes[kPlanes];
      slstm_split(weight(gate, unit_of(g), k), weight(gate, unit_of(g), k + 1), planes);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) a[plane][r] = planes[plane];
    }
  }
  DEVICE_FUNCTION void load_weights() {
    if (!active) return;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll 1
        for (int step = 0; step < my_steps; ++step) {
          u32 fragment[kPlanes][4];
          make_fragment(fragment, first_step + step, g, m);
          if (step >= kResident)
            store_fragment(weights, ((step - kResident) * kGroups + g) * 2 + m, fragment);
            // Registers have no index at run time.
#pragma unroll
          for (int i = 0; i < kResident; ++i) {
            if (i != step) continue;
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane)
#pragma unroll
              for (int r = 0; r < 4; ++r) resident[i][g][m][plane][r] = fragment[plane][r];
          }
        }
      }
    }
    prim::sync_warp();
  }

  /// States, biases, publication 0, pre-activations of token 0.
  DEVICE_FUNCTION void start(int steps) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const SlstmRow& row = rows[slstm_row_of(j)];
      length[j] = row.length;
      const int unit = column + lane / 4;
      wx_at[j] = byte_of(p.call.wx.data, slstm_offset(p.call.wx, row, 0, head, unit), wide());
      y_at[j] = byte_of(p.call.y.data, slstm_offset(p.call.y, row, 0, head, unit), wide());
      gates_at[j] =
          byte_of(p.call.gates.data, slstm_offset(p.call.gates, row, 0, head, unit), wide_gates());
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = (int64_t{gate} * s.num_heads + head) * s.dh + unit_of(g);
        bias[g][gate] = owns(g) ? load_number(p.call.b, at, p.b_dtype) : 0.0F;
      }
      float y[1][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        state[g][j] = empty_state();
        y[0][j] = 0;
        const SlstmRow& row = rows[slstm_row_of(j)];
        if (row.sequence < 0 || !owns(g)) continue;
        const int64_t at = (int64_t{row.sequence} * s.num_heads + head) * s.dh + unit_of(g);
        if (s.in.y0 != nullptr) {
          y[0][j] = s.in.y0[at];
          state[g][j].c = s.in.c0[at];
          if (Cell::kStates == 3) state[g][j].n = s.in.n0[at], state[g][j].m = p.call.m0[at];
        }
        if (row.length == 0) {
          write_last(g, j, at, y[0][j]);
        } else {
          const bool reset = slstm_reset(s, row, 0);
          enter(g, j, 0, reset);
          if (reset) y[0][j] = 0;
        }
      }
      if (active && split == 0 && steps > 0) publish(g, 0, y);
    }
    if (active && split == 0 && steps > 0) exchange.done(0);
    prefetch(0);
  }

  /// A state as it enters token t.
  DEVICE_FUNCTION void enter(int g, int j, int t, bool reset) {
    if (reset) state[g][j] = empty_state();
    if (p.call.checkpoints == nullptr || t % static_cast<int>(kSlstmCheckpointTokens) != 0) return;
    float* to = p.call.checkpoints +
                slstm_checkpoint(s, rows[slstm_row_of(j)], t, head, unit_of(g), Cell::kStates);
    to[0] = state[g][j].c;
    if (Cell::kStates == 3) to[s.dh] = state[g][j].n, to[2 * s.dh] = state[g][j].m;
  }

  DEVICE_FUNCTION void publish(int g, int k, const float (&y)[1][2]) {
    const int base = column + g * kSlstmGroupUnits;
    slstm_rows_of<kPlanes, Exchange::kWords>(
        y, [&](int, int plane, int row, int unit, const u32(&words)[Exchange::kWords]) {
          exchange.put(k, plane * kSlstmRows + row, base + unit, words);
        });
  }

  /// Starts the loads of what token t adds to the product, and of whether the token is a reset; the next one after it is
  /// token t + 1.
  DEVICE_FUNCTION void prefetch(int t) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool within = t < length[j];
      next_reset[j] = within && slstm_reset(s, rows[slstm_row_of(j)], t);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const bool loads = within && owns(g);
        const unsigned char* at =
            wx_at[j] + (g * kSlstmGroupUnits * p.call.wx.unit << size_shift(wide()));
#pragma unroll
        for (int gate = 0; gate < 4; ++gate, at += p.call.wx.gate << size_shift(wide()))
          next[g][gate][j] = loads ? load_bits(at, 0, wide()) : 0;
      }
      wx_at[j] += p.call.wx.time << size_shift(wide());
    }
  }
  DEVICE_FUNCTION static int part_of(int gate, int j) { return 2 * (gate % 2) + j; }
  DEVICE_FUNCTION void start_sums() {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          sums[g][gate / 2][part_of(gate, j)] =
              bias[g][gate] + number_of<kPlanes>(next[g][gate][j], wide());
#pragma unroll
    for (int i = 0; i < (kChains - 1) * 8; ++i) other_sums[i / 4][i % 4] = 0;
  }

  DEVICE_FUNCTION void multiply(const bf16* y) {
    if (!active) return;
    const int pitch = slstm_pitch(kernel(), d);
    const SlstmColumns from(y, pitch, 16 * first_step);
    slstm_for_steps<kPlanes, kResident>(
        from, pitch, my_steps, [&](int i, const u32(&b)[kPlanes][4], int first) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g)
#pragma unroll
            for (int m = 0; m < 2; ++m)
              slstm_multiply(i % kChains == 0 ? sums[g][m] : other_sums[m], resident[i][g][m], b,
                             first);
        });
#pragma unroll
    for (int i = 0; i < (kChains - 1) * 8; ++i) sums[0][i / 4][i % 4] += other_sums[i / 4][i % 4];
    if constexpr (!kernel().small) multiply_others(from, pitch);
  }
  /// The steps whose weights lie in shared memory.
  DEVICE_FUNCTION void multiply_others(const SlstmColumns& from, int pitch) {
#pragma unroll 1
    for (int i = kResident; i < my_steps; ++i) {
      u32 b[kPlanes][4];
      slstm_columns(b, from.single + 16 * i, pitch);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          u32 fragment[kPlanes][4];
          load_fragment(fragment, weights, ((i - kResident) * kGroups + g) * 2 + m);
          slstm_multiply(sums[g][m], fragment, b, 0);
        }
      }
    }
  }

  /// Adds the sums of the other warps of the same units, in their order.
  DEVICE_FUNCTION void add_partials() {
    float* own = partials + warp * 8 * 32 + lane;
    if (active && split > 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) own[i * 32] = sums[0][i / 4][i % 4];
    }
    prim::sync_block();
    if (!active || split > 0) return;
#pragma unroll 1
    for (int other = 1; other < d.splits; ++other) {
      own += 8 * 32;
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[0][i / 4][i % 4] += own[i * 32];
    }
  }

  /// The cell, its results, and publication t + 1.
  DEVICE_FUNCTION void finish(int t, int steps) {
    if (t + 1 < steps) exchange.open(t + 1);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      // Both sequences' cells side by side, without a branch between them; first of all what the other units wait for.
      CellGates gates[2];
      float y[2], passed[1][2];
      bool within[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        within[j] = t < length[j] && unit_of(g) < s.dh;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) gates[j].g[gate] = sums[g][gate / 2][part_of(gate, j)];
        const CellStep step = Cell::step(gates[j], state[g][j]);
        y[j] = step.o * step.hidden;
        if (within[j]) state[g][j] = step.after;
        passed[0][j] = within[j] && !next_reset[j] ? y[j] : 0.0F;
      }
      if (t + 1 < steps) publish(g, t + 1, passed);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!within[j]) continue;
        if (p.call.gates.data != nullptr) write_gates(g, j, gates[j]);
        store_rounded<kPlanes>(y_at[j], g * kSlstmGroupUnits * p.call.y.inner, wide(), y[j]);
        if (t + 1 < length[j]) {
          enter(g, j, t + 1, next_reset[j]);
        } else {
          const int sequence = rows[slstm_row_of(j)].sequence;
          write_last(g, j, (int64_t{sequence} * s.num_heads + head) * s.dh + unit_of(g), y[j]);
        }
      }
    }
    if (t + 1 < steps) exchange.done(t + 1);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      y_at[j] += p.call.y.time << size_shift(wide());
      gates_at[j] += p.call.gates.time << size_shift(wide_gates());
    }
  }
  DEVICE_FUNCTION void write_gates(int g, int j, const CellGates& gates) {
    const int shift = size_shift(wide_gates());
    unsigned char* at = gates_at[j] + (g * kSlstmGroupUnits * p.call.gates.unit << shift);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate, at += p.call.gates.gate << shift)
      store_rounded<kPlanes>(at, 0, wide_gates(), gates.g[gate]);
  }
  DEVICE_FUNCTION void write_last(int g, int j, int64_t at, float y) {
    p.call.y_last[at] = y;
    p.call.c[at] = state[g][j].c;
    if (Cell::kStates == 3) p.call.n[at] = state[g][j].n, p.call.m[at] = state[g][j].m;
  }

  const SlstmForwardParams& p;
  const SlstmShape& s;
  const SlstmDivision& d;
  SlstmRow (&rows)[kSlstmRows];
  const SlstmShared layout;
  float* const partials;
  const int lane, warp, group, rank, head, split;
  Exchange exchange;
  Bytes16* weights;
  int first_step, my_steps;
  int column;   ///< first unit of the warp
  bool active;  ///< has units

  u32 resident[kResident][kGroups][2][kPlanes][4];
  float sums[kGroups][2][4];  ///< [group][gates 2 m, 2 m + 1][accumulator]
  float other_sums[2][4];     ///< of the second chain
  CellState state[kGroups][2];
  float bias[kGroups][4];
  u32 next[kGroups][4][2];  ///< [group][gate][sequence]
  bool next_reset[2];
  int length[2];
  const unsigned char* wx_at[2];  ///< of the first group's unit, at the next token
  unsigned char *y_at[2], *gates_at[2];
};

template <SlstmCell kCell, class Exchange, int kGroups, int kPlanes>
DEVICE_FUNCTION void slstm_forward_steps(const SlstmForwardParams& p) {
  SlstmForwardBlock<CellPolicy<kCell, kPlanes == 1>, Exchange, kGroups, kPlanes>(
      p, prim::dynamic_shared())
      .run();
}

template <SlstmCell kCell, int kGroups, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_forward_block(const GRID_CONSTANT SlstmForwardParams p) {
  slstm_forward_steps<kCell, BlockExchange, kGroups, kPlanes>(p);
}
template <SlstmCell kCell, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_forward_grid(const GRID_CONSTANT SlstmForwardParams p) {
  slstm_forward_steps<kCell, GridExchange, 1, kPlanes>(p);
}
template <SlstmCell kCell, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_forward_sm90(const GRID_CONSTANT SlstmForwardParams p) {
#if PRIM_HAS_SM90A
  slstm_forward_steps<kCell, ClusterExchange, 1, kPlanes>(p);
#endif
}

}  // namespace xlstm::cuda
