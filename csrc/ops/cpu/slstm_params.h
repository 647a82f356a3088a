#pragma once
// What the sLSTM/LSTM CPU kernels get: pointers, strides in elements, sizes. One call handles the work items
// [item_begin, item_end) on the calling thread; an item is (head, tile of rows), rows being sequences.
#include <cstdint>

#include "csrc/ops/cpu/capability.h"

namespace xlstm::cpu {

enum class SlstmDtype { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class SlstmCell { kSlstm, kSlstmExpf, kLstm };

/// Tokens between two checkpoints of the state, and the length of the pieces in which the backward runs.
constexpr int64_t kSlstmSegment = 16;

/// Gate activations saved per unit and token: [e or i, sigmoid(-f) or f,] tanh(z), sigmoid(o); see slstm_cells.h.
constexpr int64_t slstm_saved_gates(SlstmCell cell) {
  return cell == SlstmCell::kSlstmExpf ? 3 : 4;
}
/// States saved per checkpoint: y, c and, but for the LSTM, n; where the gates are computed again from it, m as well.
constexpr int64_t slstm_checkpoint_states(SlstmCell cell, bool recompute) {
  return cell == SlstmCell::kLstm ? 2 : recompute ? 4 : 3;
}

/// One sequence: tokens [begin, begin + length) of batch row `batch`, and its index in the state tensors.
struct SlstmRow {
  int64_t batch, begin, length, state;
};

/// Shared by both directions. Rows are sorted by falling length, so the rows alive at a step are a prefix.
/// Real is float (float64: double). `dh_padded` is DH rounded up to 64 bytes of Real.
struct SlstmShape {
  SlstmCell cell;
  SlstmDtype dtype;  // of wx, y and their gradients; Real is double for kFloat64, else float
  int64_t time, heads, dh, dh_padded;
  const SlstmRow* rows;
  int64_t row_count, tile_rows, tile_count;  // item = head * tile_count + tile
  const bool* reset;                         // nullptr: none
  int64_t reset_stride[2];                   // b, t
  int64_t checkpoint_slots;                  // ceil(time / kSlstmSegment)
  int64_t item_begin, item_end;
  void* workspace;  // of slstm_*_workspace() Reals, 64-byte aligned, private to the call
};

/// What the recurrence computes from. r (4,NH,DH,DH), b (4,NH,DH), states (N,NH,DH): contiguous Real.
struct SlstmInputs : SlstmShape {
  const void* wx;
  int64_t wx_stride[5];
  const void *r, *b;
  const void *y0, *c0, *n0, *m0;  // null: empty state
  bool recompute;                 // the backward pass computes the gates again
};

/// gates (B,NH,T,S,DH) and checkpoints (B,NH,slots,K,DH): contiguous Real, or null where not wanted.
struct SlstmForwardParams : SlstmInputs {
  void* y;                   // (B,T,NH,DH) contiguous
  void *y_last, *c, *n, *m;  // LSTM: n and m are not written
  void *gates, *checkpoints;
};

/// wx, b and m0 are null but with recompute, gates is null with it.
/// dr (NH, tiles, 4, DH, dh_padded) and db (NH, tiles, 4, dh_padded): sums of one item each, zeroed by the kernel.
struct SlstmBackwardParams : SlstmInputs {
  const void* dy;  // null: zero
  int64_t dy_stride[4];
  const void *dy_last, *dc_last, *dn_last;  // contiguous Real or null
  const void *gates, *checkpoints;
  double recurrent_clip;  // bound of every entry of sum_g R_g^T dg; 0: none
  bool recurrent_cut;     // that sum counts as zero
  void* dwx;
  int64_t dwx_stride[5];
  void *dr, *db;
  void *dy0, *dc0, *dn0;  // (N,NH,DH); LSTM: dn0 is not written
};

/// Leading dimension of the backward's gate gradients: one cache line more than 4 dh_padded, so that columns do not
/// fall into the same cache sets.
constexpr int64_t slstm_gate_pitch(int64_t dh_padded) { return 4 * dh_padded + 16; }

constexpr int64_t slstm_forward_workspace(int64_t tile_rows, int64_t dh, int64_t dh_padded) {
  return 4 * dh * dh_padded + 4 * dh_padded + tile_rows * 9 * dh_padded;
}
constexpr int64_t slstm_backward_workspace(int64_t tile_rows, int64_t dh, int64_t dh_padded,
                                           bool recompute) {
  const int64_t steps = kSlstmSegment * tile_rows;
  const int64_t again =
      recompute ? slstm_forward_workspace(tile_rows, dh, dh_padded) + steps * 4 * dh_padded : 0;
  return 4 * dh_padded * dh_padded + tile_rows * 4 * dh_padded +
         steps * (slstm_gate_pitch(dh_padded) + 5 * dh_padded) + again;
}

}  // namespace xlstm::cpu

XLSTM_CPU_KERNEL(slstm_forward_items, SlstmForwardParams)
XLSTM_CPU_KERNEL(slstm_backward_items, SlstmBackwardParams)
