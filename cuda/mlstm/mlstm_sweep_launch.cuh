#pragma once
// Defines launch_sweep_tile; one translation unit per use instantiates it, so that they compile in parallel.
#include "cuda/mlstm/mlstm_sweep.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {

template <Use kUse, int kDA, int kDX, int kPlanes>
bool launch_if(const SweepTile& tile, const SweepParams& p, Stream stream) {
  constexpr SweepTile kTile = {kDA, kDX, kPlanes};
  if (!(tile == kTile)) return false;
  prim::LaunchShape shape;
  shape.blocks = static_cast<u32>(p.chunks.num_sequences) * static_cast<u32>(p.chunks.num_heads) *
                 static_cast<u32>(p.chunks.segments) * static_cast<u32>(divide_up(p.x.width, kDX));
  shape.threads = 256;
  shape.shared_bytes = sweep_shared_bytes(kTile, p.stages);
  prim::launch("mlstm_sweep", mlstm_sweep<kUse, kDA, kDX, kPlanes>, shape, p, stream);
  return true;
}

template <Use kUse>
void launch_sweep_tile(const SweepTile& tile, const SweepParams& p, Stream stream) {
  const bool launched =
      launch_if<kUse, 64, 64, 1>(tile, p, stream) || launch_if<kUse, 64, 128, 1>(tile, p, stream) ||
      launch_if<kUse, 128, 64, 1>(tile, p, stream) ||
      launch_if<kUse, 128, 128, 1>(tile, p, stream) ||
      launch_if<kUse, 256, 64, 1>(tile, p, stream) || launch_if<kUse, 64, 64, 2>(tile, p, stream) ||
      launch_if<kUse, 128, 64, 2>(tile, p, stream);
  if (!launched) throw std::runtime_error("mlstm_sweep: no kernel for this tile");
}

}  // namespace xlstm::cuda
