#pragma once
// Launchers of the state and out kernels for sm_90a, and which calls they take; all others keep the kernels for sm_80, which
// read and write the same states.
#include "cuda/mlstm/mlstm_params.h"

namespace xlstm::cuda {

/// Whether the device has the kernels, wants them (DeviceLimits::hopper), and the copy engine can load the operands.
bool state_sm90_takes(const StateParams& params, const DeviceLimits& device);
bool out_sm90_takes(const SweepParams& params, const DeviceLimits& device);

void launch_state_sm90(const StateParams& params, Stream stream);
void launch_out_sm90(Use use, const SweepParams& params, const DeviceLimits& device, Stream stream);

}  // namespace xlstm::cuda
