#pragma once
// Gates and normaliser of the mLSTM in ATen calls.
#include <ATen/TensorOperators.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/maximum.h>

#include "csrc/ops/cpu/mlstm_params.h"

namespace xlstm::ops {

inline at::Tensor column(const at::Tensor& x) { return x.unsqueeze(-1); }

inline at::Tensor log_gate(const at::Tensor& x, bool sigmoid, double lowest) {
  return (sigmoid ? at::log_sigmoid(x) : x).clamp_min(lowest);
}

/// exp(-m), what the normaliser is at least. m: float64.
inline at::Tensor normaliser_floor(const at::Tensor& m) {
  return (-m).clamp(cpu::kMinNegM, cpu::kMaxNegM).exp();
}

/// N of scale q . n and exp(-m).
inline at::Tensor normaliser(const at::Tensor& product, const at::Tensor& floor, double eps) {
  return at::maximum(product.abs(), floor) + eps;
}

}  // namespace xlstm::ops
