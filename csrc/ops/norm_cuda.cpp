// headwise_norm on CUDA: the kernels of cuda/norm, or ATen calls where these do not take a call.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/ops/cuda_device.h"
#include "csrc/ops/norm_generic.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/norm_kernels.h"
#endif

namespace xlstm::ops {
namespace {

/// Whether the kernels take a call; logs the answer.
bool use_kernels(const at::Tensor& x) {
  std::string lack = cuda_kernels_lack(x.device());
#ifdef XLSTM_CUDA
  if (lack.empty()) lack = headwise_norm_kernels_lack(x);
#endif
  return takes_kernels("headwise_norm", lack);
}

at::Tensor headwise_norm_cuda(const at::Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& skip,
                              const OptionalTensor& skip_weight, const OptionalTensor& gate,
                              double eps, std::string_view kind, std::string_view gate_activation) {
  const HeadwiseNormArguments a{x,    weight, bias, skip,           skip_weight,
                                gate, eps,    kind, gate_activation};
  check_headwise_norm(a);
  const c10::DeviceGuard guard(x.device());
  if (!use_kernels(x)) return headwise_norm_generic(a);
#ifdef XLSTM_CUDA
  return headwise_norm_kernels_forward(a, current_stream(x.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
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
  if (!use_kernels(x)) return headwise_norm_generic_backward(dy, a);
#ifdef XLSTM_CUDA
  return headwise_norm_kernels_backward(dy, a, current_stream(x.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("headwise_norm", headwise_norm_cuda);
  m.impl("headwise_norm_backward", headwise_norm_backward_cuda);
}

}  // namespace xlstm::ops
