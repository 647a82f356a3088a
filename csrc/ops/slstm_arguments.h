#pragma once
// What the CPU, CUDA and Meta sides of the sLSTM operators share: arguments and their checks, result sizes, and the step
// between them and the dispatcher, which passes the arguments of a schema one by one.
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "csrc/ops/cpu/slstm_params.h"

namespace xlstm::ops {

using OptionalTensor = std::optional<at::Tensor>;

/// y, y_last, c, n, m
using SlstmOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// y, y_last, c, n, m and, for the backward, gates, without elements where they are computed again, and checkpoints.
/// On the CPU: activations (B,NH,T,S,DH) and states (B,NH,ceil(T/16),K,DH), see csrc/ops/cpu/slstm_params.h. Elsewhere
/// (`preactivations`): wx + r y + b in full precision, shape and memory order of wx, and c, n, m (LSTM: c) entering every
/// 16th token of every sequence, (slots,NH,K,DH), see cuda/slstm/slstm.h.
using SlstmResults =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// dwx, dr, db, dy0, dc0, dn0
using SlstmGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct SlstmArguments {
  at::Tensor wx, r, b;
  OptionalTensor y0, c0, n0, m0, reset, cu_seqlens;
  std::string_view cell;
  bool recompute;
  double recurrent_clip;
  bool recurrent_cut;
  bool preactivations = false;  // what slstm_forward keeps
};

/// y, gates and checkpoints: of slstm_forward. wx and b are there where the gates are computed again; m0 there and with
/// preactivations.
struct SlstmBackwardArguments {
  OptionalTensor dy, dy_last, dc, dn;
  at::Tensor y, gates, checkpoints;
  OptionalTensor wx;
  at::Tensor r;
  OptionalTensor b, y0, c0, n0, m0, reset, cu_seqlens;
  std::string_view cell;
  double recurrent_clip;
  bool recurrent_cut;
  int64_t gate_dim;  // of dwx

  bool recompute() const { return wx.has_value(); }
};

/// "slstm", "slstm_expf" or "lstm"; anything else is an error.
cpu::SlstmCell slstm_cell(std::string_view name);

/// Shapes, dtypes and devices of all arguments (not the values of cu_seqlens); symbolic sizes are fine.
void check_slstm_arguments(const SlstmArguments& a);

/// The same for what slstm_forward returned and the caller passes on, but for gates and checkpoints.
void check_slstm_backward_arguments(const SlstmBackwardArguments& a);

/// That slstm_forward kept what this device's kernels need.
void check_slstm_saved(const SlstmBackwardArguments& a, bool preactivations);

/// Empty results of the right sizes; undefined gates and checkpoints unless `saved`.
SlstmResults empty_slstm_results(const SlstmArguments& a, bool saved);

/// Sequences, longest first. Reads cu_seqlens, which waits for its device, and throws where it does not rise from 0 to T.
std::vector<cpu::SlstmRow> slstm_sequences(int64_t batch, int64_t time,
                                           const OptionalTensor& cu_seqlens);

/// Empty gradients of the right sizes.
SlstmGradients empty_slstm_gradients(const SlstmBackwardArguments& a);

/// The axes of wx in the order of its memory: where the gate axis stands in (B,T,NH,DH): 0 (4,B,T,NH,DH),
/// 2 (B,T,4,NH,DH), 3 (B,T,NH,4,DH) or 4 (B,T,NH,DH,4). The gradient gets the same order.
int64_t slstm_gate_dim(const at::Tensor& wx);

// ---- kernels as the dispatcher calls them -------------------------------------------------------------------------

/// kFunction takes SlstmArguments.
template <auto kFunction>
std::invoke_result_t<decltype(kFunction), const SlstmArguments&> slstm_kernel(
    const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b, const OptionalTensor& y0,
    const OptionalTensor& c0, const OptionalTensor& n0, const OptionalTensor& m0,
    const OptionalTensor& reset, const OptionalTensor& cu_seqlens, std::string_view cell,
    bool recompute, double recurrent_clip, bool recurrent_cut) {
  return kFunction({wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, cell, recompute, recurrent_clip,
                    recurrent_cut});
}

template <auto kFunction>
SlstmResults slstm_forward_kernel(const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
                                  const OptionalTensor& y0, const OptionalTensor& c0,
                                  const OptionalTensor& n0, const OptionalTensor& m0,
                                  const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                                  std::string_view cell, bool recompute, double recurrent_clip,
                                  bool recurrent_cut, bool preactivations) {
  return kFunction({wx, r, b, y0, c0, n0, m0, reset, cu_seqlens, cell, recompute, recurrent_clip,
                    recurrent_cut, preactivations});
}

/// kFunction takes SlstmBackwardArguments.
template <auto kFunction>
SlstmGradients slstm_backward_kernel(const OptionalTensor& dy, const OptionalTensor& dy_last,
                                     const OptionalTensor& dc, const OptionalTensor& dn,
                                     const at::Tensor& y, const at::Tensor& gates,
                                     const at::Tensor& checkpoints, const OptionalTensor& wx,
                                     const at::Tensor& r, const OptionalTensor& b,
                                     const OptionalTensor& y0, const OptionalTensor& c0,
                                     const OptionalTensor& n0, const OptionalTensor& m0,
                                     const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                                     std::string_view cell, double recurrent_clip,
                                     bool recurrent_cut, int64_t gate_dim) {
  return kFunction(
      {dy, dy_last, dc,    dn,         y,    gates,          checkpoints,   wx,      r, b, y0, c0,
       n0, m0,      reset, cu_seqlens, cell, recurrent_clip, recurrent_cut, gate_dim});
}

}  // namespace xlstm::ops
