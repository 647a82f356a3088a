#pragma once
// One launcher per sLSTM kernel.
#include "cuda/slstm/slstm_plan.h"

namespace xlstm::cuda {

/// Zeros `count` counters.
void launch_slstm_clear(u32* counters, int32_t count, Stream stream);

/// The blocks of map.groups_per_launch groups from params.shape.division.first_group on, as far as there are any.
template <SlstmCell kCell>
void launch_slstm_forward(const SlstmMap& map, const SlstmForwardParams& params, Stream stream);
/// Before it, for all steps: params.slopes from gates and checkpoints.
void launch_slstm_slopes(const SlstmProblem& problem, const SlstmBackwardParams& params,
                         Stream stream);
/// kStates: slstm_kept_states of the cell.
template <int kStates>
void launch_slstm_backward(const SlstmMap& map, const SlstmBackwardParams& params, Stream stream);

}  // namespace xlstm::cuda
