#pragma once
#include "cuda/prim/launch.h"
#include "cuda/slstm/slstm_launch.h"

namespace xlstm::cuda {

/// Blocks of the groups from first_group on.
inline prim::LaunchShape slstm_launch_shape(const SlstmMap& map, int32_t first_group) {
  const int32_t left = map.groups - first_group;
  prim::LaunchShape shape;
  shape.blocks =
      static_cast<u32>((left < map.groups_per_launch ? left : map.groups_per_launch) * map.blocks);
  shape.threads = kSlstmThreads;
  shape.shared_bytes = map.shared_bytes;
  shape.cluster = map.exchange == SlstmExchange::kGrid      ? 0
                  : map.exchange == SlstmExchange::kCluster ? static_cast<u32>(map.blocks)
                                                            : 1;
  return shape;
}

}  // namespace xlstm::cuda
