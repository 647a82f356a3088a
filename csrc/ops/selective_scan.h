#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

/// The selective state space of Mamba (arXiv 2312.00752), N states per channel:
///   h_t = e^{delta_t a} h_{t-1} + delta_t b_t x_t        y_t = c_t . h_t + skip x_t
/// x, delta (B,T,D); a (D,N) (negative for a decay); b, c (B,T,N); skip (D); state0 (B,D,N) float32 (float64 for
/// float64), zero where absent. reset (B,T) bool: h is zero before that token. Returns y in x's dtype and the last h.
/// Gradients are the true ones for everything but reset.
std::tuple<at::Tensor, at::Tensor> selective_scan(const at::Tensor& x, const at::Tensor& delta,
                                                  const at::Tensor& a, const at::Tensor& b,
                                                  const at::Tensor& c, const at::Tensor& skip,
                                                  const std::optional<at::Tensor>& state0 = {},
                                                  const std::optional<at::Tensor>& reset = {});

}  // namespace xlstm::ops
