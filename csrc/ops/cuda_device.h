#pragma once
// What the operators' CUDA files share: the device, the stream, and which path a call takes. Works without nvcc, too.
#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "cuda/tensors.h"

namespace xlstm::ops {

/// Logs a text at c10's level INFO, the first time it comes: TORCH_CPP_LOG_LEVEL=INFO shows it.
void log_once(const std::string& text);

/// Why no kernel may run on this CUDA device: built without nvcc (no XLSTM_CUDA) or without code for it,
/// XLSTM_CUDA_KERNELS=off in the environment, or a compute capability before 8.0. Empty: kernels may run.
std::string cuda_kernels_lack(at::Device device);

/// Logs once per reason which path a call of `op` takes; true where nothing is lacking.
bool takes_kernels(std::string_view op, const std::string& lack);

/// Asked once per device; needs nvcc.
const cuda::DeviceLimits& device_limits(at::Device device);
/// torch's current stream of the device; needs nvcc.
cuda::Stream current_stream(at::Device device);

}  // namespace xlstm::ops
