#pragma once
// headwise_norm and residual_norm on the kernels of cuda/norm: tensors -> rows, scratch memory from torch's allocator, no synchronisation.
// Arguments are checked already; the tensors' device is the current one.
#include <string>

#include "csrc/ops/norm_arguments.h"
#include "cuda/tensors.h"

namespace xlstm::ops {

/// Why no kernel takes a call; empty: the kernels do.
std::string headwise_norm_kernels_lack(const at::Tensor& x);

/// limits: of the tensors' device.
at::Tensor headwise_norm_kernels_forward(const HeadwiseNormArguments& a, cuda::Stream stream,
                                         const cuda::DeviceLimits& limits = {});
HeadwiseNormGradients headwise_norm_kernels_backward(const at::Tensor& dy,
                                                     const HeadwiseNormArguments& a,
                                                     cuda::Stream stream,
                                                     const OptionalTensor& dsum = {},
                                                     const cuda::DeviceLimits& limits = {});
/// sum: empty_residual_sum's; becomes x + branch. a: of the sum.
at::Tensor residual_norm_kernels_forward(const at::Tensor& x, const at::Tensor& branch,
                                         const HeadwiseNormArguments& a, cuda::Stream stream,
                                         const cuda::DeviceLimits& limits = {});

}  // namespace xlstm::ops
