// The forward pass: one launch, or with kGrid one per set of groups that are resident together.
#include <stdexcept>

#include "cuda/slstm/slstm_launch.h"

namespace xlstm::cuda {

size_t slstm_forward_workspace(const SlstmProblem& problem, const DeviceLimits& device) {
  Workspace count(nullptr);
  take_grid_memory(plan_slstm(problem, device, Direction::kForward), count);
  return count.used();
}

void slstm_forward(const SlstmProblem& problem, const DeviceLimits& device,
                   const SlstmForward& call, void* workspace, Stream stream) {
  const SlstmMap map = plan_slstm(problem, device, Direction::kForward);
  if (map.exchange == SlstmExchange::kAuto)
    throw std::runtime_error("slstm_forward: no kernel for this problem (slstm_supported)");
  SlstmForwardParams p;
  p.shape = slstm_shape(problem, map, call.in);
  p.b_dtype = problem.b_dtype;
  p.call = call;
  Workspace memory(workspace);
  p.shape.grid = take_grid_memory(map, memory);
  if (p.shape.grid.arrivals != nullptr)
    launch_slstm_clear(p.shape.grid.arrivals, map.groups, stream);
  for (int32_t first = 0; first < map.groups; first += map.groups_per_launch) {
    p.shape.division.first_group = first;
    if (problem.cell == SlstmCell::kSlstm) {
      launch_slstm_forward<SlstmCell::kSlstm>(map, p, stream);
    } else if (problem.cell == SlstmCell::kSlstmExpf) {
      launch_slstm_forward<SlstmCell::kSlstmExpf>(map, p, stream);
    } else {
      launch_slstm_forward<SlstmCell::kLstm>(map, p, stream);
    }
  }
}

}  // namespace xlstm::cuda
