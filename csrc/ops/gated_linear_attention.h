#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

struct GatedLinearAttentionOptions {
  std::optional<at::Tensor> reset;  ///< (B,T) bool: the state is empty before that token
  std::optional<double> scale;      ///< applied to q; default DK^-1/2
  /// Never changes the result beyond rounding. 0: token by token in kernels of the CPU and of CUDA (heads up to 1024, not
  /// float64), in chunks of 16 where there is none; above 0: chunks of this length on every device, for comparison: on a
  /// CPU some 40 times slower.
  int64_t chunk_size = 0;
};

/// Linear attention with a decay of its own for each row of the state:
///   S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T        h_t = S_t^T (scale q_t)
/// and with a bonus u (RWKV-5, -6), which reads before it writes: h_t = (S_{t-1} + diag(u) k_t v_t^T)^T (scale q_t).
/// q, k, g (B,T,NH,DK), g <= 0, -inf forgets all; v (B,T,NH,DV); u (NH,DK); state0 (B,NH,DK,DV) float32 (float64 for
/// float64), zero where absent; T >= 0, any strides. Returns h in v's dtype and the last S. No exponent above zero is ever
/// taken. Gradients are the true ones for everything but reset. Deterministic. Backward keeps the arguments alone.
std::tuple<at::Tensor, at::Tensor> gated_linear_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const std::optional<at::Tensor>& u = {}, const std::optional<at::Tensor>& state0 = {},
    const GatedLinearAttentionOptions& options = {});

}  // namespace xlstm::ops
