#pragma once
// headwise_norm and residual_norm in ATen calls: any device and number type, nothing read on the host. Arguments are checked already.
#include "csrc/ops/norm_arguments.h"

namespace xlstm::ops {

at::Tensor headwise_norm_generic(const HeadwiseNormArguments& a);
HeadwiseNormGradients headwise_norm_generic_backward(const at::Tensor& dy,
                                                     const HeadwiseNormArguments& a);
ResidualNormResult residual_norm_generic(const at::Tensor& x, const at::Tensor& branch,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         double eps, std::string_view kind);
ResidualNormGradients residual_norm_generic_backward(const OptionalTensor& dsum,
                                                     const at::Tensor& dy, const at::Tensor& sum,
                                                     const HeadwiseNormArguments& a);

}  // namespace xlstm::ops
