// mlstm_step_inputs on CUDA: the kernel of cuda/mlstm, or one operator after the other where it does not take a call.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/ops/cuda_device.h"
#include "csrc/ops/mlstm_step_inputs.h"
#ifdef XLSTM_CUDA
#include "csrc/ops/mlstm_step_inputs_kernels.h"
#endif

namespace xlstm::ops {
namespace {

MlstmStepInputsResults step_inputs_cuda(const MlstmStepInputsArguments& a) {
  [[maybe_unused]] const MlstmStepInputsSizes sizes = check_mlstm_step_inputs(a);
  const c10::DeviceGuard guard(a.x.device());
  std::string lack = cuda_kernels_lack(a.x.device());
#ifdef XLSTM_CUDA
  if (lack.empty()) lack = mlstm_step_inputs_kernels_lack(a, sizes, device_limits(a.x.device()));
  if (takes_kernels(a.kName, lack))
    return mlstm_step_inputs_kernels_forward(a, sizes, current_stream(a.x.device()));
#else
  takes_kernels(a.kName, lack);
#endif
  return mlstm_step_inputs_generic(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(xlstm, CUDA, m) {
  m.impl("mlstm_step_inputs", mlstm_step_inputs_kernel<step_inputs_cuda>);
}

}  // namespace xlstm::ops
