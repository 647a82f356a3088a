#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace xlstm::ops {

/// Head-wise norm with skip and gate, one pass over memory:
///   y = (norm(x) * weight + bias + skip_weight * skip) * act(gate)
/// x (...,NH,DH): each vector of DH is normalised, kind "layer": (x - mean) / sqrt(var + eps), biased variance;
/// "rms": x / sqrt(mean(x^2) + eps). Statistics in float32 (float64 for float64).
/// weight, bias, skip_weight (NH*DH); skip, gate (...,NH*DH); all optional (skip and skip_weight come together).
/// gate_activation "silu" | "sigmoid". Returns (...,NH*DH) in x's dtype. NH = 1 is an ordinary LayerNorm or RMSNorm.
at::Tensor headwise_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight = {},
                         const std::optional<at::Tensor>& bias = {},
                         const std::optional<at::Tensor>& skip = {},
                         const std::optional<at::Tensor>& skip_weight = {},
                         const std::optional<at::Tensor>& gate = {}, double eps = 1e-5,
                         std::string_view kind = "layer",
                         std::string_view gate_activation = "silu");

/// The next addition to a residual stream and the norm that reads it, one pass over memory:
///   sum = x + branch, y = norm(sum) * weight + bias
/// x, branch (...,D) of one shape; weight, bias (D); the norm over D, kind and eps as of headwise_norm. sum and y in the type that x and branch promote to; y is the
/// norm of the sum as it is rounded. Backward adds the gradient of sum in the norm's pass.
std::tuple<at::Tensor, at::Tensor> residual_norm(const at::Tensor& x, const at::Tensor& branch,
                                                 const std::optional<at::Tensor>& weight = {},
                                                 const std::optional<at::Tensor>& bias = {},
                                                 double eps = 1e-5,
                                                 std::string_view kind = "layer");

}  // namespace xlstm::ops
