#pragma once
// Defines launch_slstm_backward; one translation unit per number of states instantiates it, so that they compile in parallel.
#include "cuda/slstm/slstm_backward.cuh"
#include "cuda/slstm/slstm_launch_shape.cuh"

namespace xlstm::cuda {

template <int kStates, int kPlanes>
void launch_slstm_backward_planes(const SlstmMap& map, const SlstmBackwardParams& p,
                                  Stream stream) {
  const prim::LaunchShape shape = slstm_launch_shape(map, p.shape.division.first_group);
  if (map.exchange == SlstmExchange::kCluster) {
    prim::launch("slstm_backward_sm90", slstm_backward_sm90<kStates, kPlanes>, shape, p, stream);
  } else if (map.exchange == SlstmExchange::kGrid) {
    prim::launch("slstm_backward_grid", slstm_backward_grid<kStates, kPlanes>, shape, p, stream);
  } else if (map.kernel.groups == 2) {
    prim::launch("slstm_backward_block", slstm_backward_block<kStates, 2, kPlanes>, shape, p,
                 stream);
  } else {
    prim::launch("slstm_backward_block", slstm_backward_block<kStates, 1, kPlanes>, shape, p,
                 stream);
  }
}

template <int kStates>
void launch_slstm_backward(const SlstmMap& map, const SlstmBackwardParams& p, Stream stream) {
  if (map.kernel.planes == 1) {
    launch_slstm_backward_planes<kStates, 1>(map, p, stream);
  } else {
    launch_slstm_backward_planes<kStates, 2>(map, p, stream);
  }
}

}  // namespace xlstm::cuda
