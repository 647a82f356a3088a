#pragma once
// The sLSTM operators on the kernels of cuda/slstm: tensors -> views, workspace from torch's allocator. Arguments are checked
// already and nothing is empty; every function launches on `stream` of the tensors' device, which is the current one. (The
// emulator's tests call these with CPU tensors.)
//
// Where a persistent kernel takes the sizes, one launch does all time steps and the host waits for nothing. Everywhere else
// a product by ATen and one launch follow each other step by step; then packed sequences are read back from the device to
// know how many steps there are, so that such a call waits for it and cannot be captured in a CUDA graph.
#include <string>

#include "csrc/ops/slstm_arguments.h"
#include "cuda/slstm/slstm.h"

namespace xlstm::ops {

struct SlstmSizes {
  int64_t batch, time, num_heads, dh;
  int64_t num_sequences;  ///< B, or of cu_seqlens
};
SlstmSizes slstm_sizes(const SlstmArguments& a);
SlstmSizes slstm_sizes(const SlstmBackwardArguments& a);

struct SlstmDevice {
  cuda::DeviceLimits limits;
  cuda::Stream stream = nullptr;
};

/// Why no kernel takes a call of these sizes and this dtype; empty: the kernels do.
std::string slstm_kernels_lack(const SlstmSizes& sizes, at::ScalarType dtype);

/// Whether it is a persistent kernel that takes them, with `gradients` in both directions.
bool slstm_persistent(const SlstmSizes& sizes, at::ScalarType dtype,
                      const cuda::DeviceLimits& limits, bool gradients);

/// gates and checkpoints are undefined unless `saved`.
SlstmResults slstm_kernels_forward(const SlstmArguments& a, const SlstmSizes& sizes,
                                   const SlstmDevice& device, bool saved);
SlstmGradients slstm_kernels_backward(const SlstmBackwardArguments& a, const SlstmSizes& sizes,
                                      const SlstmDevice& device);

}  // namespace xlstm::ops
