#pragma once
// The persistent backward kernel, from the last step to the first. What is passed on are the gradients of all four gates;
// a block's warps share the product that gives its own units' dy_{t-1}: 16 units and a part of the columns of R^T each.
// Then a warp has 8 units as in the forward kernel (16 where it has all the columns), a thread one of each 8 for its
// sequences 2 (lane % 4) + {0, 1}. What a step multiplies with comes from memory (slstm_slopes.cuh), one step ahead.
#include "cuda/slstm/slstm_exchange.cuh"
#include "cuda/slstm/slstm_slopes.cuh"

namespace xlstm::cuda {

/// kStates: slstm_kept_states of the cell.
template <int kStates, class Exchange, int kGroups, int kPlanes>
class SlstmBackwardBlock {
 public:
  static PRIM_FUNCTION constexpr SlstmKernelShape kernel() {
    return {kGroups, kPlanes, 4, Exchange::kBuffers, Exchange::kWithinBlock && kGroups == 1};
  }
  static constexpr int kResident = slstm_resident(kernel());

  DEVICE_FUNCTION SlstmBackwardBlock(const SlstmBackwardParams& params, unsigned char* shared)
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
        splits(kGroups == 1 ? kSlstmWarps * 16 / d.units : 1),
        exchange(slstm_space(kernel(), params.shape, layout, shared, group, rank)) {
    const int steps = slstm_steps(kernel(), d).all, split = warp % splits,
              local = warp / splits * 16;
    first_step = split * steps;
    const int left = 4 * d.padded / 16 - first_step;
    my_steps = left < steps ? (left < 0 ? 0 : left) : steps;
    product_unit = rank * d.units + local;
    if (product_unit >= d.padded) my_steps = 0;
    weights = reinterpret_cast<Bytes16*>(shared + layout.weights) +
              warp * (steps > kResident ? steps - kResident : 0) * (kPlanes * 32);
    const int own = warp * kGroups * kSlstmGroupUnits;
    column = rank * d.units + own;
    active = own < d.units && column < d.padded;
  }

  DEVICE_FUNCTION void run() {
    slstm_read_rows(s, group, rows);
    prim::sync_block();
    const int steps = slstm_longest(rows);
    load_weights();
    // The last product is dy0.
    const int publications = p.call.recurrent_cut ? 0 : p.call.dy0 == nullptr ? steps - 1 : steps;
    exchange.begin(publications);
    start(steps - 1);
    for (int t = steps - 1; t >= 0; --t) {
      const int k = steps - 1 - t;
      if (active) step(t, k < publications ? k : -1);
      if (k < publications) {
        multiply(exchange.wait(k, true));
        carry();
      }
    }
    finish();
    exchange.end();
  }

 private:
  /// The type of wx and y.
  DEVICE_FUNCTION bool wide() const { return kPlanes == 2 && s.dtype == Dtype::kFloat32; }
  DEVICE_FUNCTION int unit_of(int g) const { return column + g * kSlstmGroupUnits + lane / 4; }
  DEVICE_FUNCTION bool owns(int g) const { return active && unit_of(g) < s.dh; }
  DEVICE_FUNCTION int64_t state_at(const SlstmRow& row, int g) const {
    return (int64_t{row.sequence} * s.num_heads + head) * s.dh + unit_of(g);
  }

  DEVICE_FUNCTION float weight(int gate, int from, int to) const {
    if (from >= s.dh || to >= s.dh) return 0;
    return load_number(s.in.r, ((int64_t{gate} * s.num_heads + head) * s.dh + from) * s.dh + to,
                       s.r_dtype);
  }
  DEVICE_FUNCTION void load_weights() {
    const int per_gate = d.padded / 16;
#pragma unroll 1
    for (int i = 0; i < my_steps; ++i) {
      const int gate = (first_step + i) / per_gate;
      u32 fragment[kPlanes][4];
#pragma unroll 1
      for (int r = 0; r < 4; ++r) {
        const int to = product_unit + lane / 4 + 8 * (r % 2);
        const int from = 16 * ((first_step + i) % per_gate) + 2 * (lane % 4) + 8 * (r / 2);
        u32 planes[kPlanes];
        slstm_split(weight(gate, from, to), weight(gate, from + 1, to), planes);
        // Registers have no index at run time.
#pragma unroll
        for (int other = 0; other < 4; ++other)
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane)
            if (other == r) fragment[plane][other] = planes[plane];
      }
      if (i >= kResident) store_fragment(weights, i - kResident, fragment);
#pragma unroll
      for (int other = 0; other < kResident; ++other) {
        if (other != i) continue;
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
#pragma unroll
          for (int r = 0; r < 4; ++r) resident[other][plane][r] = fragment[plane][r];
      }
    }
    prim::sync_warp();
  }

  /// `last`: the first step of the kernel.
  DEVICE_FUNCTION void start(int last) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const SlstmRow& row = rows[slstm_row_of(j)];
      const int unit = column + lane / 4;
      length[j] = row.length;
      const int64_t token = int64_t{row.batch} * s.time + row.begin + last;
      slopes_at[j] = (token * s.num_heads + head) * s.dh + unit;
      dy_at[j] = byte_of(p.call.dy.data, slstm_offset(p.call.dy, row, last, head, unit), wide());
      dwx_at[j] = byte_of(p.call.dwx.data, slstm_offset(p.call.dwx, row, last, head, unit), wide());
      cut[j] = true;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) carried[g][j] = 0, gradient[g][j] = {0, 0};
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) prefetch(g, last);
    to_next_loads();
  }
  /// The gradients of a sequence's final state.
  DEVICE_FUNCTION void enter_last(int g, int j, int64_t at) {
    carried[g][j] = p.call.dy_last == nullptr ? 0.0F : p.call.dy_last[at];
    gradient[g][j].dc = p.call.dc == nullptr ? 0.0F : p.call.dc[at];
    if (kStates == 3) gradient[g][j].dn = p.call.dn == nullptr ? 0.0F : p.call.dn[at];
  }

  /// Starts the loads of step t.
  DEVICE_FUNCTION void prefetch(int g, int t) {
    if (t < 0) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (t >= length[j] || !owns(g)) continue;
      next[g][j] = load_slopes<kPlanes>(p.slopes, slopes_at[j] + g * kSlstmGroupUnits);
      if (p.call.dy.data != nullptr)
        next_dy[g][j] = load_bits(dy_at[j], g * kSlstmGroupUnits * p.call.dy.inner, wide());
    }
  }
  DEVICE_FUNCTION void to_next_loads() {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      slopes_at[j] -= int64_t{s.num_heads} * s.dh, dy_at[j] -= p.call.dy.time << size_shift(wide());
  }

  // One step -----------------------------------------------------------------------------------------------------------

  /// The cell backwards: dwx_t, gradients of the state before it, and publication k (-1: none).
  DEVICE_FUNCTION void step(int t, int k) {
    if (k >= 0) exchange.open(k);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      CellSlopes slopes[2];
      float dy[2], out[4][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        slopes[j] = unpack_slopes<kStates, kPlanes>(next[g][j]);
        dy[j] = p.call.dy.data == nullptr ? 0.0F : number_of<kPlanes>(next_dy[g][j], wide());
      }
      prefetch(g, t - 1);
      // As forward: no branch between the sequences, and first of all what the other units wait for.
      bool within[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        within[j] = t < length[j] && owns(g);
        if (within[j] && t + 1 == length[j]) enter_last(g, j, state_at(rows[slstm_row_of(j)], g));
        CellGradient after = gradient[g][j];
        const CellGates gates = cell_gradients(slopes[j], carried[g][j] + dy[j], after);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) out[gate][j] = within[j] ? gates.g[gate] : 0.0F;
        if (!within[j]) continue;
        cut[j] = is_cut(slopes[j]);
        carried[g][j] = 0;
        gradient[g][j] = cut[j] ? CellGradient{0, 0} : after;
      }
      if (k >= 0) {
        const int base = column + g * kSlstmGroupUnits;
        slstm_rows_of<kPlanes, Exchange::kWords>(
            out, [&](int gate, int plane, int row, int unit, const u32(&words)[Exchange::kWords]) {
              exchange.put(k, plane * kSlstmRows + row, gate * d.padded + base + unit, words);
            });
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!within[j]) continue;
        const int shift = size_shift(wide());
        unsigned char* at = dwx_at[j] + (g * kSlstmGroupUnits * p.call.dwx.unit << shift);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate, at += p.call.dwx.gate << shift)
          store_rounded<kPlanes>(at, 0, wide(), out[gate][j]);
      }
    }
    if (k >= 0) exchange.done(k);
    to_next_loads();
#pragma unroll
    for (int j = 0; j < 2; ++j) dwx_at[j] -= p.call.dwx.time << size_shift(wide());
  }

  DEVICE_FUNCTION void multiply(const bf16* buffer) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0;
    const int pitch = slstm_pitch(kernel(), d);
    const SlstmColumns from(buffer, pitch, 16 * first_step);
    slstm_for_steps<kPlanes, kResident>(from, pitch, my_steps,
                                        [&](int i, const u32(&b)[kPlanes][4], int first) {
                                          slstm_multiply(sums[i % 2], resident[i], b, first);
                                        });
    if (!kernel().small) {
#pragma unroll 1
      for (int i = kResident; i < my_steps; ++i) {
        u32 fragment[kPlanes][4], b[kPlanes][4];
        load_fragment(fragment, weights, i - kResident);
        slstm_columns(b, from.single + 16 * i, pitch);
        slstm_multiply(sums[0], fragment, b, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][i] += sums[1][i];
  }

  /// The product becomes what y_{t-1} gets through the recurrence.
  DEVICE_FUNCTION void carry() {
    if constexpr (kGroups == 2) {
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int j = 0; j < 2; ++j) set_carried(g, j, sums[0][2 * g + j]);
    } else {
      float* own = partials + warp * 4 * 32 + lane;
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i * 32] = sums[0][i];
      prim::sync_block();
      if (!active) return;
      const float* parts = partials + warp / 2 * splits * 4 * 32 + lane;
      float total[2] = {0, 0};
      // Always an even number of them: two loads on their way at a time.
#pragma unroll 1
      for (int split = 0; split < splits; split += 2, parts += 2 * 4 * 32) {
        float part[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          part[i / 2][i % 2] = parts[(i / 2 * 4 + 2 * (warp % 2) + i % 2) * 32];
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i % 2] += part[i / 2][i % 2];
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) set_carried(0, j, total[j]);
    }
  }
  DEVICE_FUNCTION void set_carried(int g, int j, float value) {
    const float clip = p.call.recurrent_clip;
    if (clip > 0) value = value > clip ? clip : value < -clip ? -clip : value;
    carried[g][j] = cut[j] ? 0.0F : value;
  }

  DEVICE_FUNCTION void finish() {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const SlstmRow row = rows[slstm_row_of(j)];
        if (row.sequence < 0 || !owns(g)) continue;
        const int64_t at = state_at(row, g);
        if (row.length == 0) enter_last(g, j, at);  // final and initial states are the same
        if (p.call.dy0 != nullptr) p.call.dy0[at] = carried[g][j];
        if (p.call.dc0 != nullptr) p.call.dc0[at] = gradient[g][j].dc;
        if (kStates == 3 && p.call.dn0 != nullptr) p.call.dn0[at] = gradient[g][j].dn;
      }
  }

  const SlstmBackwardParams& p;
  const SlstmShape& s;
  const SlstmDivision& d;
  SlstmRow (&rows)[kSlstmRows];
  const SlstmShared layout;
  float* const partials;
  const int lane, warp, group, rank, head, splits;
  Exchange exchange;
  Bytes16* weights;
  int first_step, my_steps;
  int product_unit;  ///< first of the 16 units that the warp's product is for
  int column;        ///< first unit of the warp
  bool active;       ///< has units

  u32 resident[kResident][kPlanes][4];
  float sums[2][4];  ///< [chain][accumulator]
  float carried[kGroups][2];
  CellGradient gradient[kGroups][2];
  PackedSlopes<kPlanes> next[kGroups][2];
  u32 next_dy[kGroups][2];
  bool cut[2];
  int length[2];
  int64_t slopes_at[2];  ///< of the first group's unit, as the others; loads are one token ahead
  unsigned char *dy_at[2], *dwx_at[2];
};

template <int kStates, class Exchange, int kGroups, int kPlanes>
DEVICE_FUNCTION void slstm_backward_steps(const SlstmBackwardParams& p) {
  SlstmBackwardBlock<kStates, Exchange, kGroups, kPlanes>(p, prim::dynamic_shared()).run();
}

template <int kStates, int kGroups, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_backward_block(const GRID_CONSTANT SlstmBackwardParams p) {
  slstm_backward_steps<kStates, BlockExchange, kGroups, kPlanes>(p);
}
template <int kStates, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_backward_grid(const GRID_CONSTANT SlstmBackwardParams p) {
  slstm_backward_steps<kStates, GridExchange, 1, kPlanes>(p);
}
template <int kStates, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_backward_sm90(const GRID_CONSTANT SlstmBackwardParams p) {
#if PRIM_HAS_SM90A
  slstm_backward_steps<kStates, ClusterExchange, 1, kPlanes>(p);
#endif
}

}  // namespace xlstm::cuda
