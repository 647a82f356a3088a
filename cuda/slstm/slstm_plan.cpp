#include "cuda/slstm/slstm_plan.h"

#include <algorithm>
#include <limits>

namespace xlstm::cuda {
namespace {

constexpr int64_t kLargestBlock = 128, kLargestHead = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// In units of what a k16 step of a warp takes.
struct StepCosts {
  int64_t block, cluster, grid;  ///< the exchange
  int64_t cell;                  ///< per unit group
  int64_t shared;                ///< more for a k16 step whose weights come from shared memory
  int64_t sums;                  ///< where warps share the columns of R
};
/// The forward unit is 17 ns: fitted to an H200's times of heads of 64 to 512 units in blocks of 64 and 32.
constexpr StepCosts kForwardCosts{11, 33, 103, 40, 3, 11};
constexpr StepCosts kBackwardCosts{4, 24, 64, 8, 1, 0};

/// About how long a step takes.
int64_t step_cost(const SlstmMap& map) {
  const bool forward = map.kernel.channels == 1;
  const StepCosts& costs = forward ? kForwardCosts : kBackwardCosts;
  const SlstmSteps steps = slstm_steps(map.kernel, map.division);
  const int64_t beyond = std::max(0, steps.all - steps.resident);
  // A k16 step forward is one group's, backward that of both.
  const int64_t products = (forward ? map.kernel.groups : 1) * (steps.all + costs.shared * beyond);
  const int64_t exchange = map.exchange == SlstmExchange::kBlock     ? costs.block
                           : map.exchange == SlstmExchange::kCluster ? costs.cluster
                                                                     : costs.grid;
  return exchange + map.kernel.groups * costs.cell + products + (map.splits > 1 ? costs.sums : 0);
}

/// With `units` per block; exchange kAuto where this does not fit.
SlstmMap divide(const SlstmProblem& p, const DeviceLimits& device, Direction direction,
                SlstmExchange exchange, int32_t units) {
  SlstmMap map;
  SlstmDivision& d = map.division;
  d.padded = static_cast<int32_t>(ceil_div(p.dh, 16) * 16);
  d.units = units;
  d.blocks = map.blocks = static_cast<int32_t>(ceil_div(d.padded, units));
  d.splits = map.splits = units < 64 ? 64 / units : 1;
  d.sequence_tiles = static_cast<int32_t>(ceil_div(p.num_sequences, kSlstmRows));
  map.kernel.groups = units == kLargestBlock ? 2 : 1;
  map.kernel.planes = p.dtype == Dtype::kBFloat16 ? 1 : 2;
  map.kernel.channels = direction == Direction::kForward ? 1 : 4;
  map.kernel.buffers = exchange == SlstmExchange::kGrid ? 1 : 2;
  map.kernel.small = exchange == SlstmExchange::kBlock && map.kernel.groups == 1;
  map.groups = static_cast<int32_t>(p.num_heads * d.sequence_tiles);
  map.groups_per_launch = exchange == SlstmExchange::kGrid
                              ? std::min(device.num_multiprocessors / d.blocks, map.groups)
                              : map.groups;
  map.shared_bytes = slstm_shared(map.kernel, d).total;
  const bool fits = map.shared_bytes <= device.shared_bytes && map.groups_per_launch > 0 &&
                    (exchange != SlstmExchange::kBlock || d.blocks == 1) &&
                    (exchange != SlstmExchange::kCluster || d.blocks <= device.largest_cluster);
  if (fits) map.exchange = exchange;
  return map;
}

bool offered(const SlstmProblem& p, const DeviceLimits& device, SlstmExchange exchange) {
  if (p.exchange != SlstmExchange::kAuto && p.exchange != exchange) return false;
  if (exchange == SlstmExchange::kBlock) return true;
  if (exchange == SlstmExchange::kGrid) return device.cooperative;
  return device.compute_capability == 90 && (device.hopper || p.exchange == exchange);
}

}  // namespace

SlstmMap plan_slstm(const SlstmProblem& p, const DeviceLimits& device, Direction direction) {
  SlstmMap best;
  int64_t lowest = std::numeric_limits<int64_t>::max();
  const auto consider = [&](SlstmExchange exchange, int32_t units) {
    const SlstmMap map = divide(p, device, direction, exchange, units);
    if (map.exchange == SlstmExchange::kAuto) return;
    const int64_t waves = ceil_div(int64_t{map.groups} * map.blocks, device.num_multiprocessors);
    const int64_t cost = waves * step_cost(map);
    if (cost < lowest) best = map, lowest = cost;
  };
  if (offered(p, device, SlstmExchange::kBlock))
    consider(SlstmExchange::kBlock, p.dh <= 64 ? 64 : 128);
  for (const int32_t units : {64, 32, 16}) {
    if (p.dh <= units) continue;  // one block
    if (offered(p, device, SlstmExchange::kCluster)) consider(SlstmExchange::kCluster, units);
    if (offered(p, device, SlstmExchange::kGrid)) consider(SlstmExchange::kGrid, units);
  }
  return best;
}

bool slstm_supported(const SlstmProblem& p, const DeviceLimits& device, bool gradients) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  if (device.compute_capability < 80 || p.dh > kLargestHead) return false;
  if (p.num_sequences * p.num_heads >= kMost / 64 || p.time >= kMost / 128) return false;
  const auto covered = [&](Direction direction) {
    return plan_slstm(p, device, direction).exchange != SlstmExchange::kAuto;
  };
  return covered(Direction::kForward) && (!gradients || covered(Direction::kBackward));
}

SlstmGridMemory take_grid_memory(const SlstmMap& map, Workspace& workspace) {
  SlstmGridMemory memory;
  if (map.exchange != SlstmExchange::kGrid) return memory;
  const int64_t numbers =
      int64_t{2} * map.kernel.planes * map.kernel.channels * kSlstmRows * map.division.padded;
  memory.arrivals = workspace.take<u32>(map.groups);
  memory.exchange = workspace.take<bf16>(map.groups * numbers);
  return memory;
}

SlstmShape slstm_shape(const SlstmProblem& p, const SlstmMap& map, const SlstmInputs& in) {
  SlstmShape s;
  s.division = map.division;
  s.num_sequences = static_cast<int32_t>(p.num_sequences);
  s.time = static_cast<int32_t>(p.time);
  s.num_heads = static_cast<int32_t>(p.num_heads);
  s.dh = static_cast<int32_t>(p.dh);
  s.dtype = p.dtype, s.r_dtype = p.r_dtype, s.gates_dtype = p.gates_dtype;
  s.in = in;
  return s;
}

}  // namespace xlstm::cuda
