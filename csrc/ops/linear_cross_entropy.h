#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

namespace xlstm::ops {

/// Cross entropy of soft_cap(x weight^T) against target, in nats, in blocks of rows: all logits are never held.
/// x (...,D) weight (V,D) target (...) int64, ignore_index entries do not count. soft_cap > 0: c * tanh(logit / c).
/// reduction "mean" (over counted targets; 0 when there are none) | "sum" | "none" (shape of target). Returns float32
/// (float64 for float64 inputs). The gradients of x and weight are computed in the forward pass block by block where
/// the reduction allows, so the backward pass only scales them.
at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& target, int64_t ignore_index = -100,
                                double soft_cap = 0, std::string_view reduction = "mean");

}  // namespace xlstm::ops
