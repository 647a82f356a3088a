#pragma once
// The causal convolution on the kernels of cuda/causal_conv1d: tensors -> views, scratch memory from torch's allocator, no
// synchronisation. Arguments are checked already; the tensors' device is the current one.
#include <string>

#include "csrc/ops/causal_conv1d_arguments.h"
#include "cuda/tensors.h"

namespace xlstm::ops {

/// Why no kernel takes a call; empty: the kernels do.
std::string causal_conv1d_kernels_lack(const CausalConv1dSizes& sizes, at::ScalarType dtype);

CausalConv1dOutputs causal_conv1d_kernels_forward(const CausalConv1dArguments& a,
                                                  const CausalConv1dSizes& sizes,
                                                  cuda::Stream stream);
CausalConv1dGradients causal_conv1d_kernels_backward(const CausalConv1dArguments& a,
                                                     const CausalConv1dSizes& sizes,
                                                     const OptionalTensor& dy,
                                                     const OptionalTensor& dstate,
                                                     cuda::Stream stream);
at::Tensor causal_conv1d_kernels_step(const at::Tensor& x, const at::Tensor& weight,
                                      const OptionalTensor& bias, at::Tensor& state, bool silu,
                                      cuda::Stream stream);

}  // namespace xlstm::ops
