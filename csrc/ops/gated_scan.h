#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

/// The elementwise gated recurrence of HGRN (arXiv 2311.04823):  h_t = a_t h_{t-1} + x_t.
/// x, a (B,T,D), |a| <= 1; state0 (B,D) float32 (float64 for float64), zero where absent; reset (B,T) bool: h is zero
/// before that token. Returns h in x's dtype and the last h. Gradients are the true ones for everything but reset; they
/// are computed from h as returned.
std::tuple<at::Tensor, at::Tensor> gated_scan(const at::Tensor& x, const at::Tensor& a,
                                              const std::optional<at::Tensor>& state0 = {},
                                              const std::optional<at::Tensor>& reset = {});

/// h_t = a_t h_{t-1} + x_t from zero, or, reverse, h_t = a_{t+1} h_{t+1} + x_t, in log2(T) elementwise passes: what runs
/// where there is no kernel. x, a (B,T,D) float32 or float64; reset (B,T) bool, may be undefined: nothing passes by way of
/// that token's a, whatever it is.
at::Tensor scan_in_passes(at::Tensor x, at::Tensor a, at::Tensor reset, bool reverse);

}  // namespace xlstm::ops
