// The causal convolution on CUDA: the kernels of cuda/causal_conv1d, or ATen calls where these do not take a call.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/ops/causal_conv1d_generic.h"
#include "csrc/ops/cuda_device.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/causal_conv1d_kernels.h"
#endif

namespace xlstm::ops {
namespace {

/// Whether the kernels take a call; logs the answer.
bool use_kernels([[maybe_unused]] const CausalConv1dSizes& sizes, const at::Tensor& x) {
  std::string lack = cuda_kernels_lack(x.device());
#ifdef XLSTM_CUDA
  if (lack.empty()) lack = causal_conv1d_kernels_lack(sizes, x.scalar_type());
#endif
  return takes_kernels("causal_conv1d", lack);
}

CausalConv1dOutputs causal_conv1d_cuda(const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& state0,
                                       const OptionalTensor& reset,
                                       const OptionalTensor& cu_seqlens, bool silu) {
  const CausalConv1dArguments a{x, weight, bias, state0, reset, cu_seqlens, silu};
  const CausalConv1dSizes sizes = check_causal_conv1d(a);
  const c10::DeviceGuard guard(x.device());
  if (!use_kernels(sizes, x)) return causal_conv1d_generic(a, sizes);
#ifdef XLSTM_CUDA
  return causal_conv1d_kernels_forward(a, sizes, current_stream(x.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

CausalConv1dGradients causal_conv1d_backward_cuda(
    const OptionalTensor& dy, const OptionalTensor& dstate, const at::Tensor& x,
    const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state0,
    const OptionalTensor& reset, const OptionalTensor& cu_seqlens, bool silu) {
  const CausalConv1dArguments a{x, weight, bias, state0, reset, cu_seqlens, silu};
  const CausalConv1dSizes sizes = check_causal_conv1d(a);
  check_causal_conv1d_gradients(a, sizes, dy, dstate);
  const c10::DeviceGuard guard(x.device());
  if (!use_kernels(sizes, x)) return causal_conv1d_generic_backward(a, sizes, dy, dstate);
#ifdef XLSTM_CUDA
  return causal_conv1d_kernels_backward(a, sizes, dy, dstate, current_stream(x.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor causal_conv1d_step_cuda(const at::Tensor& x, const at::Tensor& weight,
                                   const OptionalTensor& bias, at::Tensor& state, bool silu) {
  const CausalConv1dSizes sizes = check_causal_conv1d_step(x, weight, bias, state);
  const c10::DeviceGuard guard(x.device());
  if (!use_kernels(sizes, x)) return causal_conv1d_generic_step(x, weight, bias, state, silu);
#ifdef XLSTM_CUDA
  return causal_conv1d_kernels_step(x, weight, bias, state, silu, current_stream(x.device()));
#endif
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("causal_conv1d", causal_conv1d_cuda);
  m.impl("causal_conv1d_backward", causal_conv1d_backward_cuda);
  m.impl("causal_conv1d_step", causal_conv1d_step_cuda);
}

}  // namespace xlstm::ops
