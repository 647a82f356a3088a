#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace xlstm::ops {

struct SlstmOptions {
  std::optional<at::Tensor> reset;       ///< (B,T) bool: the state is empty before that token
  std::optional<at::Tensor> cu_seqlens;  ///< (N+1) integers; B must be 1; states are then (N,NH,DH)
  std::string_view cell = "slstm";       ///< "slstm" | "slstm_expf" | "lstm"
  bool recompute = false;                ///< the backward pass computes the gates again
  double recurrent_clip = 0;   ///< bound of the gradient that flows back through r; 0: none
  bool recurrent_cut = false;  ///< no gradient flows back through r
};

/// sLSTM or LSTM over a sequence with block-diagonal recurrence (arXiv 2405.04517, eq. 8-18), one kernel for all steps.
///   g_t = wx_t + r_g y_{t-1} + b_g for g in i,f,z,o
///   slstm: m_t = max(logsig(f) + m_{t-1}, i)  c = f' c + i' tanh(z)  n = f' n + i'  y = sigmoid(o) c / n
///   slstm_expf: forget gate exp(f) in place of sigmoid(f).   lstm: c = sig(f) c + sig(i) tanh(z), y = sig(o) tanh(c).
/// wx (B,T,4,NH,DH) in gate order i,f,z,o, any strides   r (4,NH,DH_out,DH_in)   b (4,NH,DH)
/// y0,c0,n0,m0 (B,NH,DH) float32 (float64 for float64): the empty state y=c=n=0, m=-inf where absent (then m_1 = i_1).
/// Give y0 and c0 together, and for the sLSTM cells n0 and m0 with them. lstm ignores n0 and m0 and returns zeros there.
/// Maths, states and, on the CPU, the y that enters the recurrent product are float32 (float64 for float64): y is rounded
/// to wx's dtype on the way out only. r and b may be in wx's dtype or in float32. T = 0 and zero-length sequences pass
/// their states through. cu_seqlens that do not rise from 0 to T are an error. The persistent CUDA kernels do not look at
/// them, which would wait for the device: there the first counts as 0, the last as T, others beyond as the nearer of both,
/// one that falls as the one before.
/// Gradients are the true ones for wx, r, b, y0, c0, n0, with m constant (m0 gets none); those of c and n at the end mean
/// c and n in units of e^m.
/// Gradients are the same bits every time for a given number of threads. Second derivatives are an error.
/// Returns y (B,T,NH,DH) in wx's dtype and the last y, c, n, m in float32. m is detached (exact: y does not depend on it).
///
/// For the backward pass the forward keeps 3-4 floats per unit and token, not wx. With `recompute` it keeps wx instead,
/// and the states every 16 tokens: 8 bytes per unit and token for 16-bit wx where the gates take 12 or 16, nothing saved
/// for float32 unless the caller keeps wx anyway; on the CPU about half a forward pass more time. The values are the
/// same: on the CPU to the bit, on CUDA to the rounding of the gates.
///
/// The next two change the gradients, which are no longer those of the function (the values stay):
/// `recurrent_clip` c > 0 bounds every entry of sum_g r_g^T dg_t, which is what reaches y_{t-1} (y0 for the first token)
/// through the recurrence, to [-c, c]; the gradient that comes from outside into y_{t-1} is added after. Training with
/// recurrent weights often takes 10. Gradients of wx, r, b, y0, c0 and n0 follow from the bounded ones; where no entry
/// exceeds c, they are the true ones. `recurrent_cut` leaves that sum out altogether: y_{t-1} counts as a constant in
/// step t, so y0 gets none; r and b get the gradients dg_t y_{t-1}^T and dg_t of the single steps, and the path through
/// c and n stays. With r = 0 both change nothing but the gradient of r.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> slstm(
    const at::Tensor& wx, const at::Tensor& r, const at::Tensor& b,
    const std::optional<at::Tensor>& y0 = {}, const std::optional<at::Tensor>& c0 = {},
    const std::optional<at::Tensor>& n0 = {}, const std::optional<at::Tensor>& m0 = {},
    const SlstmOptions& options = {});

}  // namespace xlstm::ops
