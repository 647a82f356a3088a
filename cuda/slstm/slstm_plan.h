#pragma once
// Which kernel takes a problem, and how it is divided. Depends on sizes and device alone.
#include "cuda/slstm/slstm_params.h"
#include "cuda/workspace.h"

namespace xlstm::cuda {

struct SlstmMap {
  SlstmExchange exchange = SlstmExchange::kAuto;  ///< kAuto: no kernel covers the problem
  SlstmKernelShape kernel;
  SlstmDivision division;
  int32_t blocks = 0, splits = 0;  ///< of the division
  int32_t groups = 0;              ///< heads times tiles of sequences
  int32_t groups_per_launch = 0;
  size_t shared_bytes = 0;
};

SlstmMap plan_slstm(const SlstmProblem& problem, const DeviceLimits& device, Direction direction);

/// kGrid's memory; the counters are zeroed by slstm_clear.
SlstmGridMemory take_grid_memory(const SlstmMap& map, Workspace& workspace);

SlstmShape slstm_shape(const SlstmProblem& problem, const SlstmMap& map, const SlstmInputs& in);

}  // namespace xlstm::cuda
