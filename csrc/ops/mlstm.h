#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace xlstm::ops {

struct MlstmOptions {
  std::optional<at::Tensor> reset;       ///< (B,T) bool: the state is empty before that token
  std::optional<at::Tensor> cu_seqlens;  ///< (N+1) int32; B must be 1; states are then (N,...)
  std::string_view input_gate = "exp";   ///< "exp" | "sigmoid"
  bool normalize = true;
  std::optional<double> scale;  ///< applied to q; default DQK^-1/2
  double eps = 1e-6;
  int64_t chunk_size =
      0;  ///< 0: automatic, above 1024: 1024; never changes the result beyond rounding
};

/// mLSTM over a sequence (arXiv 2405.04517, eq. 19-27), chunkwise-parallel, linear memory in T.
///   m_t = max(logsig(f_t) + m_{t-1}, i_t)   C_t = f' C_{t-1} + i' k_t v_t^T   n_t = f' n_{t-1} + i' k_t
///   h_t = C_t^T (scale q_t) / (max(|n_t . scale q_t|, exp(-m_t)) + eps)
/// q,k (B,T,NH,DQK)  v (B,T,NH,DV)  igate,fgate (B,T,NH) pre-activations; any strides; T >= 0.
/// c0 (B,NH,DQK,DV) n0 (B,NH,DQK) m0 (B,NH): float32 (float64 for float64 inputs), zero where absent.
/// Returns h (B,T,NH,DV) in q's dtype and the states c, n, m after the last token, shaped as c0, n0, m0.
/// input_gate "sigmoid": logsig(i_t) in place of i_t, and every m is 0, m0 too. normalize = false: h_t = C_t^T (scale q_t),
/// meant for the sigmoid gate (with "exp" it is h relative to e^m).
/// Gradients are exact with m detached: m carries no gradient and dm0 = 0; the path eps -> m is left out, which
/// is nothing at eps = 0 and at most 1e-3 of the gate gradients in extreme gates at 1e-6.
/// Throws c10::Error naming the argument, what was expected and what came. On CUDA the values of cu_seqlens are not
/// checked: that would wait for the device.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mlstm_chunkwise(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& igate,
    const at::Tensor& fgate, const std::optional<at::Tensor>& c0 = {},
    const std::optional<at::Tensor>& n0 = {}, const std::optional<at::Tensor>& m0 = {},
    const MlstmOptions& options = {});

/// One token, without a T axis: q,k (B,NH,DQK) v (B,NH,DV) igate,fgate (B,NH). Updates c, n, m in place; returns h
/// (B,NH,DV). No gradient.
at::Tensor mlstm_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& igate, const at::Tensor& fgate, at::Tensor& c,
                      at::Tensor& n, at::Tensor& m, const MlstmOptions& options = {});

}  // namespace xlstm::ops
