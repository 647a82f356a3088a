#pragma once
// Defines launch_slstm_forward; one translation unit per cell instantiates it, so that they compile in parallel.
#include "cuda/slstm/slstm_forward.cuh"
#include "cuda/slstm/slstm_launch_shape.cuh"

namespace xlstm::cuda {

template <SlstmCell kCell, int kPlanes>
void launch_slstm_forward_planes(const SlstmMap& map, const SlstmForwardParams& p, Stream stream) {
  const prim::LaunchShape shape = slstm_launch_shape(map, p.shape.division.first_group);
  if (map.exchange == SlstmExchange::kCluster) {
    prim::launch("slstm_forward_sm90", slstm_forward_sm90<kCell, kPlanes>, shape, p, stream);
  } else if (map.exchange == SlstmExchange::kGrid) {
    prim::launch("slstm_forward_grid", slstm_forward_grid<kCell, kPlanes>, shape, p, stream);
  } else if (map.kernel.groups == 2) {
    prim::launch("slstm_forward_block", slstm_forward_block<kCell, 2, kPlanes>, shape, p, stream);
  } else {
    prim::launch("slstm_forward_block", slstm_forward_block<kCell, 1, kPlanes>, shape, p, stream);
  }
}

template <SlstmCell kCell>
void launch_slstm_forward(const SlstmMap& map, const SlstmForwardParams& p, Stream stream) {
  if (map.kernel.planes == 1) {
    launch_slstm_forward_planes<kCell, 1>(map, p, stream);
  } else {
    launch_slstm_forward_planes<kCell, 2>(map, p, stream);
  }
}

}  // namespace xlstm::cuda
