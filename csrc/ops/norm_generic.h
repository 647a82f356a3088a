#pragma once
// headwise_norm in ATen calls: any device and number type, nothing read on the host. Arguments are checked already.
#include "csrc/ops/norm_arguments.h"

namespace xlstm::ops {

at::Tensor headwise_norm_generic(const HeadwiseNormArguments& a);
HeadwiseNormGradients headwise_norm_generic_backward(const at::Tensor& dy,
                                                     const HeadwiseNormArguments& a);

}  // namespace xlstm::ops
