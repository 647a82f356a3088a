// headwise_norm on CUDA, in ATen calls.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/ops/norm_generic.h"

namespace xlstm::ops {
namespace {

at::Tensor headwise_norm_cuda(const at::Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& skip,
                              const OptionalTensor& skip_weight, const OptionalTensor& gate,
                              double eps, std::string_view kind, std::string_view gate_activation) {
  const HeadwiseNormArguments a{x,    weight, bias, skip,           skip_weight,
                                gate, eps,    kind, gate_activation};
  check_headwise_norm(a);
  const c10::DeviceGuard guard(x.device());
  return headwise_norm_generic(a);
}

HeadwiseNormGradients headwise_norm_backward_cuda(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& skip, const OptionalTensor& skip_weight,
    const OptionalTensor& gate, double eps, std::string_view kind,
    std::string_view gate_activation) {
  const HeadwiseNormArguments a{x,    weight, bias, skip,           skip_weight,
                                gate, eps,    kind, gate_activation};
  check_headwise_norm(a);
  check_headwise_rows(dy, x, "dy");
  const c10::DeviceGuard guard(x.device());
  return headwise_norm_generic_backward(dy, a);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("headwise_norm", headwise_norm_cuda);
  m.impl("headwise_norm_backward", headwise_norm_backward_cuda);
}

}  // namespace xlstm::ops
