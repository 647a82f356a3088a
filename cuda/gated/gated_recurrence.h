#pragma once
// Linear attention with a decay of its own for each row of the state, on CUDA: only launches on the given stream. Throw
// std::runtime_error where a launch fails.
//
// Per sequence and head, with q scaled already and a_t = e^{g_t} in [0, 1], A_t the gradient of S_t:
//   S_t = diag(a_t) S_{t-1} + k_t v_t^T                  h_t = S_t^T q_t          dq_t = S_t dh_t
//   A_t = diag(a_{t+1}) A_{t+1} + q_t dh_t^T             dk_t = A_t v_t           dv_t = A_t^T k_t
// and where there is a bonus, which makes h_t read S_{t-1},
//   A_t = diag(a_{t+1}) A_{t+1} + q_{t+1} dh_{t+1}^T     h_t = S_{t-1}^T q_t      dq_t = S_{t-1} dh_t
// So h, dq, dk and dv are one recurrence X = d X + w b^T, read with a vector r, that differs in who plays which part. The
// terms of the bonus itself are elementwise and none of this.
#include <cstdint>

#include "cuda/tensors.h"

namespace xlstm::cuda {

enum class RecurrenceOrder : int32_t {
  kDecayWriteRead,  ///< h, dq
  kWriteReadDecay,  ///< dk, dv: from the last token to the first
  kReadDecayWrite,  ///< all four with a bonus
};

/// The matrix X has a column for each of the `own` outputs of a token and a row for each of the `across` numbers that an
/// output is a sum over. All tensors are contiguous float32 (B,T,NH,across) or (B,T,NH,own) and begin at 16 bytes; both
/// widths are multiples of 4, at most 1024.
struct GatedRecurrenceParams {
  int32_t batch = 0, time = 0, num_heads = 0, across = 0, own = 0;
  RecurrenceOrder order = RecurrenceOrder::kDecayWriteRead;
  bool backwards = false;         ///< from the last token to the first
  const float* read = nullptr;    ///< r, of width across
  const float* write = nullptr;   ///< w, of width across
  const float* weight = nullptr;  ///< b, of width own
  const float* decay = nullptr;   ///< d, of width across or own
  bool decays_across = false;    ///< which of them: the decay belongs to rows of X; else to columns
  const bool* reset = nullptr;   ///< (B,T), null: none. X is empty before such a token
  int32_t row = 0, column = 0;   ///< strides of X in memory, where it is a (B,NH,DK,DV) state
  const float* start = nullptr;  ///< X before the first step; null: empty
  float* out = nullptr;          ///< of width own
  float* end = nullptr;          ///< X after the last step; null: not wanted
  const float* end_with = nullptr;  ///< a (B,NH,DK,DV) tensor; null: end_sums is not wanted
  float* end_sums = nullptr;        ///< (B,NH,own): its product with the last X, summed over rows
};

bool gated_recurrence_supported(int64_t across, int64_t own);
void gated_recurrence(const GatedRecurrenceParams& params, Stream stream);

/// Gradients of g. Per row of the state the product of A_t and S_t is that of A_{t-1} and S_{t-1} but for what token t
/// reads and writes, so that, from the last token on and with D = the product of the last state and its gradient,
///   D += q_t dq_t  (with a bonus: after dg_t)      D -= k_t dk_t      dg_t = D
/// which is exact to the rounding of the products. dq and dk without the terms of the bonus, dq that of the scaled q. Where
/// a token resets or a_t = 0, dg_t = D = 0, exactly.
struct GatedDecayGradientsParams {
  int32_t batch = 0, time = 0, num_heads = 0, width = 0;
  bool bonus = false;
  const float *q = nullptr, *k = nullptr, *dq = nullptr,
              *dk = nullptr;     ///< (B,T,NH,width) contiguous
  const float* decay = nullptr;  ///< a, (B,T,NH,width) contiguous
  const bool* reset = nullptr;   ///< (B,T), null: none
  const float* last = nullptr;   ///< (B,NH,width), null: zero
  float* dg = nullptr;           ///< (B,T,NH,width), memory of its own
};

void gated_decay_gradients(const GatedDecayGradientsParams& params, Stream stream);

}  // namespace xlstm::cuda
