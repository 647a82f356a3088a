#pragma once
// linear_int8 on the kernel of cuda/linear_int8: memory from torch's allocator, no synchronisation. Arguments are checked
// already; the tensors' device is the current one.
#include <string>

#include "csrc/ops/linear_int8.h"
#include "cuda/tensors.h"

namespace xlstm::ops {

/// Why the kernel does not take a call; empty: it does.
std::string linear_int8_kernels_lack(const at::Tensor& x, const at::Tensor& weight);

/// x and weight are not empty.
at::Tensor linear_int8_kernels_forward(const at::Tensor& x, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias, cuda::Stream stream);

}  // namespace xlstm::ops
