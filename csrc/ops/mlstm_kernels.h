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

/// Why no kernel takes a call of these sizes and this dtype, with a ring of so many tokens; empty: the kernels do. Time is
/// 1 for the steps.
std::string mlstm_kernels_lack(const MlstmSizes& sizes, at::ScalarType dtype,
                               const cuda::DeviceLimits& limits, int64_t ring_tokens = 1);

/// product is undefined unless `with_product`.
MlstmResults mlstm_kernels_forward(const MlstmArguments& a, const MlstmSizes& sizes,
                                   const MlstmDevice& device, bool with_product);
MlstmGradients mlstm_kernels_backward(const MlstmBackwardArguments& a, const MlstmSizes& sizes,
                                      const MlstmDevice& device);
at::Tensor mlstm_kernels_step(const MlstmStepArguments& a, const MlstmSizes& sizes,
                              const MlstmDevice& device);
at::Tensor mlstm_kernels_step_lazy(const MlstmLazyArguments& a, const MlstmSizes& sizes,
                                   const MlstmDevice& device);
void mlstm_kernels_fold(const MlstmFoldArguments& a, const MlstmSizes& sizes,
                        const MlstmDevice& device);

}  // namespace xlstm::ops
