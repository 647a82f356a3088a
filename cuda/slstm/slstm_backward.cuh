#pragma once
// The persistent backward kernel, from the last step to the first. What is passed on are the gradients of all four gates;
// a block's warps share the product that gives its own units' dy_{t-1}: 16 units and a part of the columns of R^T each.
// Then a warp has 8 units as in the forward kernel (16 where it has all the columns), a thread one of each 8 for its
// sequences 2 (lane % 4) + {0, 1, 8, 9}.
//
// The states before every step come from the checkpoints: where the tokens of the next one begin, its steps are replayed
// forward and their states left in global memory, each thread for itself.
#include "cuda/slstm/slstm_exchange.cuh"
#include "cuda/slstm/slstm_gates.cuh"

namespace xlstm::cuda {

template <class Cell, class Exchange, int kGroups, int kPlanes>
class SlstmBackwardBlock {
 public:
  static DEVICE_FUNCTION constexpr SlstmKernelShape kernel() {
    return {kGroups, kPlanes, 4, Exchange::kBuffers};
  }
  static constexpr int kResident = slstm_resident({kGroups, kPlanes, 4, Exchange::kBuffers});
  static constexpr int kTokens = static_cast<int>(kSlstmCheckpointTokens);

  DEVICE_FUNCTION SlstmBackwardBlock(const SlstmBackwardParams& params, unsigned char* shared)
      : p(params),
        s(params.shape),
        d(params.shape.division),
        rows(*reinterpret_cast<SlstmRow (*)[16]>(shared)),
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
    start();
    // Before the last step there is nothing but its loads: one place for these keeps the code small.
    for (int t = steps; t >= 0; --t) {
      const int k = steps - 1 - t;
      if (t < steps) step(t, k < publications ? k : -1);
      if (t > 0) prefetch(t - 1, t == steps || t % kTokens == 0);
      if (t < steps && k < publications) {
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

  DEVICE_FUNCTION void start() {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      cut[j] = true;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) carried[g][j] = 0, gradient[g][j] = {0, 0};
    }
  }
  /// The gradients of a sequence's final state.
  DEVICE_FUNCTION void enter_last(int g, int j, int64_t at) {
    carried[g][j] = p.call.dy_last == nullptr ? 0.0F : p.call.dy_last[at];
    gradient[g][j].dc = p.call.dc == nullptr ? 0.0F : p.call.dc[at];
    if (Cell::kStates == 3) gradient[g][j].dn = p.call.dn == nullptr ? 0.0F : p.call.dn[at];
  }

  // States before the steps --------------------------------------------------------------------------------------------

  DEVICE_FUNCTION float* replayed(int t, int g, int j) const {
    const int64_t token = int64_t{prim::block_idx().x} * kTokens + t % kTokens;
    return p.replay + ((token * Cell::kStates * kGroups + g) * 4 + j) * kSlstmThreads +
           prim::thread_idx().x;
  }
  static constexpr int kNextState = 4 * kGroups * kSlstmThreads;  ///< from c to n to m

  DEVICE_FUNCTION CellGates gates_of(const u32 (&bits)[4][4], int j) const {
    CellGates gates;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      gates.g[gate] = number_of<kPlanes>(bits[gate][j], s.gates_dtype == Dtype::kFloat32);
    return gates;
  }
  DEVICE_FUNCTION void load_gates(u32 (&bits)[4][4], int g, int j, const SlstmRow& row, int t) {
    const int64_t at = slstm_offset(p.call.gates, row, t, head, unit_of(g));
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      bits[gate][j] = load_bits(p.call.gates.data, at + gate * p.call.gates.gate,
                                s.gates_dtype == Dtype::kFloat32);
  }

  /// From the checkpoint before token t up to t.
  DEVICE_FUNCTION void replay(int t) {
    const int begin = t - t % kTokens;
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      CellState state[4];
      u32 bits[4][4];  // [gate][sequence]
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const SlstmRow row = rows[slstm_row_of(j)];
        if (begin >= row.length || !owns(g)) continue;
        const float* from =
            p.call.checkpoints + slstm_checkpoint(s, row, begin, head, unit_of(g), Cell::kStates);
        state[j] = empty_state();
        state[j].c = from[0];
        if (Cell::kStates == 3) state[j].n = from[s.dh], state[j].m = from[2 * s.dh];
        load_gates(bits, g, j, row, begin);
      }
#pragma unroll 1
      for (int at = begin; at <= t; ++at) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const SlstmRow row = rows[slstm_row_of(j)];
          if (at >= row.length || !owns(g)) continue;
          float* to = replayed(at, g, j);
          if (slstm_reset(s, row, at)) state[j] = empty_state();
          to[0] = state[j].c;
          if (Cell::kStates == 3) to[kNextState] = state[j].n, to[2 * kNextState] = state[j].m;
          const CellGates gates = gates_of(bits, j);
          if (at + 1 < row.length && at < t) load_gates(bits, g, j, row, at + 1);
          state[j] = Cell::step(gates, state[j]).after;
        }
      }
    }
  }

  /// Starts the loads of step t; `replays`: of its checkpoint's steps first.
  DEVICE_FUNCTION void prefetch(int t, bool replays) {
    if (!active) return;
    if (replays) replay(t);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const SlstmRow row = rows[slstm_row_of(j)];
      next_reset[j] = t < row.length && slstm_reset(s, row, t);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        next_dy[g][j] = 0;
        if (t >= row.length || !owns(g)) continue;
        load_gates(next[g], g, j, row, t);
        const float* from = replayed(t, g, j);
        before[g][j] = empty_state();
        before[g][j].c = from[0];
        if (Cell::kStates == 3)
          before[g][j].n = from[kNextState], before[g][j].m = from[2 * kNextState];
        if (p.call.dy.data == nullptr) continue;
        next_dy[g][j] =
            load_bits(p.call.dy.data, slstm_offset(p.call.dy, row, t, head, unit_of(g)), wide());
      }
    }
  }

  // One step -----------------------------------------------------------------------------------------------------------

  /// The cell backwards: dwx_t, gradients of the state before it, and publication k (-1: none).
  DEVICE_FUNCTION void step(int t, int k) {
    if (!active) return;
    if (k >= 0) exchange.open(k);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float out[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) out[gate][j] = 0;
        const SlstmRow row = rows[slstm_row_of(j)];
        cut[j] = t >= row.length || next_reset[j];
        if (t >= row.length || !owns(g)) continue;
        if (t + 1 == row.length) enter_last(g, j, state_at(row, g));
        const float dy = carried[g][j] + number_of<kPlanes>(next_dy[g][j], wide());
        const CellStep forward = Cell::step(gates_of(next[g], j), before[g][j]);
        const CellGates gates = Cell::gradients(forward, before[g][j], dy, gradient[g][j]);
        carried[g][j] = 0;
        if (next_reset[j]) gradient[g][j] = {0, 0};
        const int64_t at = slstm_offset(p.call.dwx, row, t, head, unit_of(g));
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          out[gate][j] = gates.g[gate];
          store_rounded<kPlanes>(p.call.dwx.data, at + gate * p.call.dwx.gate, wide(),
                                 gates.g[gate]);
        }
      }
      if (k < 0) continue;
      const int base = column + g * kSlstmGroupUnits;
      slstm_rows_of<kPlanes, 4>(
          out, d.tiles, [&](int channel, int plane, int row, const u32(&words)[4]) {
            exchange.put(k, (plane * 4 + channel) * 8 * d.tiles + row, base, words);
          });
    }
    if (k >= 0) exchange.done(k);
  }

  DEVICE_FUNCTION void multiply_step(int chain, const u32 (&fragment)[kPlanes][4],
                                     const bf16* buffer, int gate, int from) {
    u32 b[kPlanes][4];
    slstm_columns(b, buffer, d, 4, gate, from);
    slstm_multiply(sums[chain][0], fragment, b, 0);
    if (d.tiles == 2) slstm_multiply(sums[chain][1], fragment, b, 2);
  }
  DEVICE_FUNCTION void multiply(const bf16* buffer) {
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0;
    int gate = 16 * first_step / d.padded, from = 16 * first_step % d.padded;
    const auto advance = [&] {
      from += 16;
      if (from == d.padded) from = 0, ++gate;
    };
#pragma unroll
    for (int i = 0; i < kResident; ++i) {
      if (i < my_steps) {
        multiply_step(i % 2, resident[i], buffer, gate, from);
        advance();
      }
    }
#pragma unroll 1
    for (int i = kResident; i < my_steps; ++i) {
      u32 fragment[kPlanes][4];
      load_fragment(fragment, weights, i - kResident);
      multiply_step(0, fragment, buffer, gate, from);
      advance();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[0][i / 4][i % 4] += sums[1][i / 4][i % 4];
  }

  /// The product becomes what y_{t-1} gets through the recurrence.
  DEVICE_FUNCTION void carry() {
    if constexpr (kGroups == 2) {
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int j = 0; j < 4; ++j) set_carried(g, j, sums[0][j / 2][2 * g + j % 2]);
    } else {
      float* own = partials + warp * 8 * 32 + lane;
#pragma unroll
      for (int i = 0; i < 8; ++i) own[i * 32] = sums[0][i / 4][i % 4];
      prim::sync_block();
      if (!active) return;
      const float* parts = partials + warp / 2 * splits * 8 * 32 + lane;
      float total[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int split = 0; split < splits; ++split, parts += 8 * 32)
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] += parts[(j / 2 * 4 + 2 * (warp % 2) + j % 2) * 32];
#pragma unroll
      for (int j = 0; j < 4; ++j) set_carried(0, j, total[j]);
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
      for (int j = 0; j < 4; ++j) {
        const SlstmRow row = rows[slstm_row_of(j)];
        if (row.sequence < 0 || !owns(g)) continue;
        const int64_t at = state_at(row, g);
        if (row.length == 0) enter_last(g, j, at);  // final and initial states are the same
        if (p.call.dy0 != nullptr) p.call.dy0[at] = carried[g][j];
        if (p.call.dc0 != nullptr) p.call.dc0[at] = gradient[g][j].dc;
        if (Cell::kStates == 3 && p.call.dn0 != nullptr) p.call.dn0[at] = gradient[g][j].dn;
      }
  }

  const SlstmBackwardParams& p;
  const SlstmShape& s;
  const SlstmDivision& d;
  SlstmRow (&rows)[16];
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
  float sums[2][2][4];  ///< [chain][tile][accumulator]
  float carried[kGroups][4];
  CellGradient gradient[kGroups][4];
  CellState before[kGroups][4];
  u32 next[kGroups][4][4], next_dy[kGroups][4];  ///< [group][gate][sequence]
  bool next_reset[4], cut[4];
};

template <SlstmCell kCell, class Exchange, int kGroups, int kPlanes>
DEVICE_FUNCTION void slstm_backward_steps(const SlstmBackwardParams& p) {
  SlstmBackwardBlock<CellPolicy<kCell, kPlanes == 1>, Exchange, kGroups, kPlanes>(
      p, prim::dynamic_shared())
      .run();
}

template <SlstmCell kCell, int kGroups, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_backward_block(const GRID_CONSTANT SlstmBackwardParams p) {
  slstm_backward_steps<kCell, BlockExchange, kGroups, kPlanes>(p);
}
template <SlstmCell kCell, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_backward_grid(const GRID_CONSTANT SlstmBackwardParams p) {
  slstm_backward_steps<kCell, GridExchange, 1, kPlanes>(p);
}
template <SlstmCell kCell, int kPlanes>
KERNEL_FUNCTION(kSlstmThreads, 1)
slstm_backward_sm90(const GRID_CONSTANT SlstmBackwardParams p) {
#if PRIM_HAS_SM90A
  slstm_backward_steps<kCell, ClusterExchange, 1, kPlanes>(p);
#endif
}

}  // namespace xlstm::cuda
