// headwise_norm and residual_norm on CUDA: the kernels of cuda/norm, or ATen calls where these do not take a call.
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
bool use_kernels(const HeadwiseNormArguments& a) {
  std::string lack = cuda_kernels_lack(a.x.device());
#ifdef XLSTM_CUDA
  if (lack.empty()) lack = headwise_norm_kernels_lack(a.x);
#endif
  return takes_kernels(a.op.data(), lack);
}

at::Tensor headwise_norm_cuda(const at::Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& skip,
                              const OptionalTensor& skip_weight, const OptionalTensor& gate,
                              double eps, std::string_view kind, std::string_view gate_activation) {
  const HeadwiseNormArguments a{x,    weight, bias, skip,           skip_weight,
                                gate, eps,    kind, gate_activation};
  check_headwise_norm(a);
  const c10::DeviceGuard guard(x.device());
  if (!use_kernels(a)) return headwise_norm_generic(a);
#ifdef XLSTM_CUDA
  return headwise_norm_kernels_forward(a, current_stream(x.device()), device_limits(x.device()));
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
  check_headwise_rows(a, dy, "dy");
  const c10::DeviceGuard guard(x.device());
  if (!use_kernels(a)) return headwise_norm_generic_backward(dy, a);
#ifdef XLSTM_CUDA
  return headwise_norm_kernels_backward(dy, a, current_stream(x.device()), {},
                                        device_limits(x.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

ResidualNormResult residual_norm_cuda(const at::Tensor& x, const at::Tensor& branch,
                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                      double eps, std::string_view kind) {
  const c10::DeviceGuard guard(x.device());
  const at::Tensor sum = empty_residual_sum(x, branch);
  const SumNorm norm(sum, weight, bias, eps, kind);
  check_headwise_norm(norm.arguments());
  if (!use_kernels(norm.arguments()))
    return residual_norm_generic(x, branch, weight, bias, eps, kind);
#ifdef XLSTM_CUDA
  return {sum,
          residual_norm_kernels_forward(x, branch, norm.arguments(), current_stream(x.device()),
                                        device_limits(x.device()))};
#endif
  TORCH_INTERNAL_ASSERT(false);
}

ResidualNormGradients residual_norm_backward_cuda(const OptionalTensor& dsum, const at::Tensor& dy,
                                                  const at::Tensor& sum,
                                                  const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps,
                                                  std::string_view kind) {
  const SumNorm norm(sum, weight, bias, eps, kind);
  const HeadwiseNormArguments& a = norm.arguments();
  check_headwise_norm(a);
  check_headwise_rows(a, dy, "dy");
  if (dsum) check_headwise_rows(a, *dsum, "dsum");
  const c10::DeviceGuard guard(sum.device());
  if (!use_kernels(a)) return residual_norm_generic_backward(dsum, dy, sum, a);
#ifdef XLSTM_CUDA
  return residual_gradients(sum, headwise_norm_kernels_backward(dy, a, current_stream(sum.device()),
                                                                dsum, device_limits(sum.device())));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("headwise_norm", headwise_norm_cuda);
  m.impl("headwise_norm_backward", headwise_norm_backward_cuda);
  m.impl("residual_norm", residual_norm_cuda);
  m.impl("residual_norm_backward", residual_norm_backward_cuda);
}

}  // namespace xlstm::ops
