// Which sweep kernel takes a problem, and its launch.
#include <stdexcept>
#include <string>

#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_sweep_config.h"

namespace xlstm::cuda {
namespace {

/// Null: none. Of the tiles that hold the contraction the first is taken, or a wider one where X has more columns.
const SweepTile* find_tile(int contraction, int columns, Dtype dtype, const DeviceLimits& device) {
  const int planes = dtype == Dtype::kBFloat16 ? 1 : 2;
  const SweepTile* found = nullptr;
  for (const SweepTile& tile : kSweepTiles) {
    if (tile.planes != planes || tile.contraction < contraction ||
        sweep_shared_bytes(tile, 1) > device.shared_bytes)
      continue;
    const bool wider = found != nullptr && tile.contraction == found->contraction &&
                       tile.columns > found->columns && columns > found->columns;
    if (found == nullptr || wider) found = &tile;
  }
  return found;
}

}  // namespace

bool sweep_covers(int contraction, Dtype dtype, const DeviceLimits& device) {
  return find_tile(contraction, 1, dtype, device) != nullptr;
}

int sweep_tile_columns(int contraction, int columns, Dtype dtype, const DeviceLimits& device) {
  const SweepTile* tile = find_tile(contraction, columns, dtype, device);
  return tile == nullptr ? 0 : tile->columns;
}

int sweep_anchor_numbers(int contraction, int columns, Dtype dtype, const DeviceLimits& device) {
  const SweepTile* tile = find_tile(contraction, columns, dtype, device);
  return tile == nullptr ? 0 : sweep_anchor_numbers(*tile);
}

void launch_sweep(Use use, const SweepParams& params, const DeviceLimits& device, Stream stream) {
  const SweepTile* tile = find_tile(params.a.width, params.x.width, params.x.dtype, device);
  if (tile == nullptr)
    throw std::runtime_error("mlstm_sweep: no kernel contracts over " +
                             std::to_string(params.a.width) + " columns on this device");
  SweepParams p = params;
  p.stages = tile->planes == 1 && sweep_shared_bytes(*tile, 2) <= device.shared_bytes ? 2 : 1;
  switch (use) {
    case Use::kH:
      return launch_sweep_tile<Use::kH>(*tile, p, stream);
    case Use::kDv:
      return launch_sweep_tile<Use::kDv>(*tile, p, stream);
    case Use::kDq:
      return launch_sweep_tile<Use::kDq>(*tile, p, stream);
    case Use::kDk:
      return launch_sweep_tile<Use::kDk>(*tile, p, stream);
  }
}

}  // namespace xlstm::cuda
