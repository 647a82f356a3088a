// The sLSTM operators on CUDA: the kernels of cuda/slstm where they take a call, else the generic path in ATen calls.
// Built without nvcc (no XLSTM_CUDA), or with XLSTM_CUDA_KERNELS=off in the environment (the same in the forward and the
// backward pass), all calls are generic. On compute capability 9.0 the blocks of a head pass y on within a cluster;
// XLSTM_HOPPER=0, read when a device is first used, has them do it through global memory. Which path runs, and why, is logged
// once per reason at c10's level INFO: TORCH_CPP_LOG_LEVEL=INFO shows it.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/cuda_device.h"
#include "csrc/ops/slstm_generic.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/slstm_kernels.h"
#endif

namespace xlstm::ops {
namespace {

#ifdef XLSTM_CUDA

/// Whether the kernels take a call; logs the answer. y: (B,T,NH,DH), or wx with its gates left out.
bool use_kernels(const SlstmSizes& sizes, at::ScalarType dtype, at::Device device, bool gradients) {
  std::string lack = cuda_kernels_lack(device);
  if (lack.empty()) lack = slstm_kernels_lack(sizes, dtype);
  if (lack.empty() && !slstm_persistent(sizes, dtype, device_limits(device), gradients))
    log_once("slstm: one product and one kernel per step on CUDA: no persistent kernel for DH = " +
             std::to_string(sizes.dh));
  return takes_kernels("slstm", lack);
}

SlstmDevice current_device(const at::Tensor& x) {
  return {device_limits(x.device()), current_stream(x.device())};
}

#endif

/// No tokens or no sequences: nothing is computed, the generic path passes states through.
bool is_empty(const at::Tensor& x, const OptionalTensor& cu_seqlens) {
  return x.size(0) == 0 || x.size(1) == 0 || (cu_seqlens && cu_seqlens->size(0) == 1);
}

SlstmResults run_forward(const SlstmArguments& a, bool saved) {
  check_slstm_arguments(a);
  const c10::DeviceGuard guard(a.wx.device());
  if (!is_empty(a.wx, a.cu_seqlens)) {
#ifdef XLSTM_CUDA
    const SlstmSizes sizes = slstm_sizes(a);
    if (use_kernels(sizes, a.wx.scalar_type(), a.wx.device(), saved))
      return slstm_kernels_forward(a, sizes, current_device(a.wx), saved);
#else
    takes_kernels("slstm", cuda_kernels_lack(a.wx.device()));
#endif
  }
  return slstm_generic_forward(a, saved);
}

SlstmOutputs slstm_cuda(const SlstmArguments& a) {
  const auto [y, y_last, c, n, m, gates, checkpoints] = run_forward(a, false);
  return {y, y_last, c, n, m};
}

SlstmResults slstm_forward_cuda(const SlstmArguments& a) {
  TORCH_CHECK(a.preactivations, "slstm_forward: preactivations: expected True on CUDA");
  return run_forward(a, true);
}

SlstmGradients slstm_backward_cuda(const SlstmBackwardArguments& a) {
  check_slstm_backward_arguments(a);
  check_slstm_saved(a, true);
  const c10::DeviceGuard guard(a.y.device());
  if (!is_empty(a.y, a.cu_seqlens)) {
#ifdef XLSTM_CUDA
    const SlstmSizes sizes = slstm_sizes(a);
    if (use_kernels(sizes, a.y.scalar_type(), a.y.device(), true))
      return slstm_kernels_backward(a, sizes, current_device(a.y));
#else
    takes_kernels("slstm", cuda_kernels_lack(a.y.device()));
#endif
  }
  return slstm_generic_backward(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("slstm", slstm_kernel<slstm_cuda>);
  m.impl("slstm_forward", slstm_forward_kernel<slstm_forward_cuda>);
  m.impl("slstm_backward", slstm_backward_kernel<slstm_backward_cuda>);
}

}  // namespace xlstm::ops
