// linear_int8 on CUDA: few rows by the kernel of cuda/linear_int8, many and what it does not take in ATen calls.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/ops/cuda_device.h"
#include "csrc/ops/linear_int8_generic.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/linear_int8_kernels.h"
#endif

namespace xlstm::ops {
namespace {

at::Tensor linear_int8_cuda(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
  check_linear_int8(x, weight, bias);
  const c10::DeviceGuard guard(x.device());
  if (x.numel() == 0 || weight.numel() == 0) return linear_int8_generic(x, weight, bias);
  std::string lack = cuda_kernels_lack(x.device());
#ifdef XLSTM_CUDA
  if (lack.empty()) lack = linear_int8_kernels_lack(x, weight);
  if (takes_kernels("linear_int8", lack))
    return linear_int8_kernels_forward(x, weight, bias, current_stream(x.device()));
#else
  takes_kernels("linear_int8", lack);
#endif
  return linear_int8_generic(x, weight, bias);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) { m.impl("linear_int8", linear_int8_cuda); }

}  // namespace xlstm::ops
