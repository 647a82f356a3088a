#pragma once
// Launcher of the state kernel for sm_90a. Its operands must be covered by tensor maps (mlstm_maps_sm90.h).
#include "cuda/mlstm/mlstm_params.h"

namespace xlstm::cuda {

void launch_state_sm90(const StateParams& params, Stream stream);

}  // namespace xlstm::cuda
