#pragma once
// linear_int8 in ATen calls: any device and number type, nothing read on the host.
#include "csrc/ops/linear_int8.h"

namespace xlstm::ops {

void check_linear_int8(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);

/// Multiplies by the dequantised matrix. Arguments are checked already.
at::Tensor linear_int8_generic(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias);

}  // namespace xlstm::ops
