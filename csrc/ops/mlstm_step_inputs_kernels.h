#pragma once
// mlstm_step_inputs on the kernel of cuda/mlstm: tensors -> pointers, no synchronisation. Arguments are checked already; the
// tensors' device is the current one.
#include <string>

#include "csrc/ops/mlstm_step_inputs.h"
#include "cuda/tensors.h"

namespace xlstm::ops {

/// Why the kernel does not take a call; empty: it does.
std::string mlstm_step_inputs_kernels_lack(const MlstmStepInputsArguments& a,
                                           const MlstmStepInputsSizes& sizes,
                                           const cuda::DeviceLimits& limits);

MlstmStepInputsResults mlstm_step_inputs_kernels_forward(const MlstmStepInputsArguments& a,
                                                         const MlstmStepInputsSizes& sizes,
                                                         cuda::Stream stream);

}  // namespace xlstm::ops
