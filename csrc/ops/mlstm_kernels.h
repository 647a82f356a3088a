#pragma once
// The mLSTM operators on the kernels of cuda/mlstm: tensors -> views, workspace from torch's allocator, no
// synchronisation. Arguments are checked already; every function launches on `stream` of the tensors' device, which is
// the current one. (The emulator's tests call these with CPU tensors.)
#include <string>

#include "csrc/ops/mlstm_arguments.h"
#include "cuda/mlstm/mlstm.h"

namespace xlstm::ops {

struct MlstmDevice {
  cuda::DeviceLimits limits;
  cuda::Stream stream = nullptr;
};

/// Why no kernel takes a call of these sizes and this dtype; empty: the kernels do. Time is 1 for the step.
std::string mlstm_kernels_lack(const MlstmSizes& sizes, at::ScalarType dtype,
                               const cuda::DeviceLimits& limits);

/// product is undefined unless `with_product`.
MlstmResults mlstm_kernels_forward(const MlstmArguments& a, const MlstmSizes& sizes,
                                   const MlstmDevice& device, bool with_product);
MlstmGradients mlstm_kernels_backward(const MlstmBackwardArguments& a, const MlstmSizes& sizes,
                                      const MlstmDevice& device);
at::Tensor mlstm_kernels_step(const MlstmStepArguments& a, const MlstmSizes& sizes,
                              const MlstmDevice& device);

}  // namespace xlstm::ops
