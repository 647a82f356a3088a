#pragma once
// Torch's tensors as the kernels of cuda/ take them.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <stdexcept>

#include "csrc/ops/sequences.h"
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

inline float* floats(const at::Tensor& x) { return static_cast<float*>(kernel_data(x)); }
inline float* floats(const std::optional<at::Tensor>& x) { return x ? floats(*x) : nullptr; }

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& x) {
  return x ? std::optional(x->contiguous()) : std::nullopt;
}

inline bool aligned(const at::Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}
/// Contiguous, from a multiple of 16 bytes on; x itself where it is so.
inline at::Tensor packed(const at::Tensor& x) {
  const at::Tensor y = x.contiguous();
  return aligned(y) ? y : y.clone(at::MemoryFormat::Contiguous);
}

/// (B,T,NH,D) or, of a gate, (B,T,NH)
inline cuda::View view_of(const at::Tensor& x) {
  return {kernel_data(x), x.stride(0), x.stride(1), x.stride(2), x.dim() == 4 ? x.stride(3) : 1};
}

/// cu_seqlens as the kernels read it, T being `time`.
inline std::optional<at::Tensor> kernel_offsets(const std::optional<at::Tensor>& cu_seqlens,
                                                int64_t time) {
  return cu_seqlens ? std::optional(sequence_offsets(*cu_seqlens, time)) : std::nullopt;
}

/// Where the kernels of a recurrence find the documents: reset (B,T) bool, cu_seqlens from kernel_offsets.
template <class Inputs>
void set_documents(Inputs& in, const std::optional<at::Tensor>& reset,
                   const std::optional<at::Tensor>& cu_seqlens) {
  if (reset) {
    in.reset = static_cast<const bool*>(kernel_data(*reset));
    in.reset_batch = reset->stride(0);
    in.reset_time = reset->stride(1);
  }
  if (cu_seqlens) in.cu_seqlens = static_cast<const int32_t*>(kernel_data(*cu_seqlens));
}

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
