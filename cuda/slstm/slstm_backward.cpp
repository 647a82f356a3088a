// The backward pass: one launch, or with kGrid one per set of groups that are resident together.
#include <stdexcept>

#include "cuda/slstm/slstm_launch.h"

namespace xlstm::cuda {
namespace {

/// Of the blocks of one launch; launches follow each other.
float* take_replay_memory(const SlstmMap& map, SlstmCell cell, Workspace& workspace) {
  const int64_t blocks = int64_t{map.groups_per_launch} * map.blocks;
  return workspace.take<float>(blocks * kSlstmCheckpointTokens * slstm_kept_states(cell) *
                               map.kernel.groups * 4 * kSlstmThreads);
}

}  // namespace

size_t slstm_backward_workspace(const SlstmProblem& problem, const DeviceLimits& device) {
  Workspace count(nullptr);
  const SlstmMap map = plan_slstm(problem, device, Direction::kBackward);
  take_grid_memory(map, count);
  take_replay_memory(map, problem.cell, count);
  return count.used();
}

void slstm_backward(const SlstmProblem& problem, const DeviceLimits& device,
                    const SlstmBackward& call, void* workspace, Stream stream) {
  const SlstmMap map = plan_slstm(problem, device, Direction::kBackward);
  if (map.exchange == SlstmExchange::kAuto)
    throw std::runtime_error("slstm_backward: no kernel for this problem (slstm_supported)");
  SlstmBackwardParams p;
  p.shape = slstm_shape(problem, map, call.in);
  p.call = call;
  Workspace memory(workspace);
  p.shape.grid = take_grid_memory(map, memory);
  p.replay = take_replay_memory(map, problem.cell, memory);
  if (p.shape.grid.arrivals != nullptr)
    launch_slstm_clear(p.shape.grid.arrivals, map.groups, stream);
  for (int32_t first = 0; first < map.groups; first += map.groups_per_launch) {
    p.shape.division.first_group = first;
    if (problem.cell == SlstmCell::kSlstm) {
      launch_slstm_backward<SlstmCell::kSlstm>(map, p, stream);
    } else if (problem.cell == SlstmCell::kSlstmExpf) {
      launch_slstm_backward<SlstmCell::kSlstmExpf>(map, p, stream);
    } else {
      launch_slstm_backward<SlstmCell::kLstm>(map, p, stream);
    }
  }
}

}  // namespace xlstm::cuda
