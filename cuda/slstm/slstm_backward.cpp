// The backward pass: the slopes of all steps, then one launch, or with kGrid one per set of groups that are resident together.
#include <stdexcept>

#include "cuda/slstm/slstm_launch.h"

namespace xlstm::cuda {
namespace {

SlstmSlopesView take_slopes_memory(const SlstmProblem& p, const SlstmMap& map,
                                   Workspace& workspace) {
  const int64_t count = p.batch * p.time * p.num_heads * p.dh;
  SlstmSlopesView slopes;
  slopes.wide = workspace.take<u32>(4 * count);
  slopes.narrow = workspace.take<u32>(2 * map.kernel.planes * count);
  return slopes;
}

}  // namespace

size_t slstm_backward_workspace(const SlstmProblem& problem, const DeviceLimits& device) {
  Workspace count(nullptr);
  const SlstmMap map = plan_slstm(problem, device, Direction::kBackward);
  take_grid_memory(map, count);
  take_slopes_memory(problem, map, count);
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
  p.slopes = take_slopes_memory(problem, map, memory);
  launch_slstm_slopes(problem, p, stream);
  if (p.shape.grid.arrivals != nullptr)
    launch_slstm_clear(p.shape.grid.arrivals, map.groups, stream);
  for (int32_t first = 0; first < map.groups; first += map.groups_per_launch) {
    p.shape.division.first_group = first;
    if (slstm_kept_states(problem.cell) == 3) {
      launch_slstm_backward<3>(map, p, stream);
    } else {
      launch_slstm_backward<1>(map, p, stream);
    }
  }
}

}  // namespace xlstm::cuda
