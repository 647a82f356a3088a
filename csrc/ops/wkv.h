#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace xlstm::ops {

/// The recurrence of RWKV-4 (arXiv 2305.13048), per channel:
///   y_t = (A_{t-1} + e^{u + k_t} v_t) / (B_{t-1} + e^{u + k_t})
///   A_t = e^{-w} A_{t-1} + e^{k_t} v_t        B_t = e^{-w} B_{t-1} + e^{k_t}
/// k, v (B,T,D); w (decay per step, > 0), u (D). States a0, b0, p0 (B,D) float32 (float64 for float64) with
/// A = a e^p, B = b e^p, all three together or none (empty). reset (B,T) bool: empty before that token. Returns y in k's
/// dtype and the last a, b, p. Gradients are the true ones for k, v, w, u, a0, b0, with p constant.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
    const std::optional<at::Tensor>& a0 = {}, const std::optional<at::Tensor>& b0 = {},
    const std::optional<at::Tensor>& p0 = {}, const std::optional<at::Tensor>& reset = {});

}  // namespace xlstm::ops
