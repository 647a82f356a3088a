#pragma once
// Torch's tensors as the kernels of cuda/ take them.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <stdexcept>

#include "cuda/tensors.h"

namespace xlstm::ops {

inline cuda::Dtype kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return cuda::Dtype::kFloat32;
    case at::kBFloat16:
      return cuda::Dtype::kBFloat16;
    case at::kHalf:
      return cuda::Dtype::kFloat16;
    default:
      TORCH_CHECK(false, "no CUDA kernel for ", type);
  }
}

/// The kernels read parameters in any of their own types.
inline at::Tensor kernel_parameter(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x;
}

/// Kernels write through it only where the tensor is an output.
inline void* kernel_data(const at::Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

/// Runs launches; a failed one becomes an error that names the operator.
template <class F>
void run_kernels(const char* op, const F& launches) {
  try {
    launches();
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, op, ": ", error.what());
  }
}

}  // namespace xlstm::ops
