#pragma once
// The causal convolution in ATen calls: any device and number type, nothing read on the host, no float atomics. Slower than
// the kernels by a copy of x per tap. Arguments are checked already.
#include "csrc/ops/causal_conv1d_arguments.h"

namespace xlstm::ops {

CausalConv1dOutputs causal_conv1d_generic(const CausalConv1dArguments& a,
                                          const CausalConv1dSizes& sizes);
CausalConv1dGradients causal_conv1d_generic_backward(const CausalConv1dArguments& a,
                                                     const CausalConv1dSizes& sizes,
                                                     const OptionalTensor& dy,
                                                     const OptionalTensor& dstate);
at::Tensor causal_conv1d_generic_step(const at::Tensor& x, const at::Tensor& weight,
                                      const OptionalTensor& bias, at::Tensor& state, bool silu);

}  // namespace xlstm::ops
