#pragma once
// Launches the out kernel with a number of planes.
#include "cuda/mlstm/mlstm_out.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {

template <Use kUse, int kPlanes>
void launch_out_use(SweepParams params, const DeviceLimits& device, Stream stream) {
  using Shape = OutShape<kPlanes>;
  // With one block of keys per pass the next pass's records may not be loaded two steps ahead.
  constexpr int kMostStages = Shape::kKeyBlocks + 1;
  params.stages = choose_stages(kMostStages, Shape::shared_bytes, device);
  const int64_t blocks = int64_t{params.chunks.slots} * params.chunks.num_heads *
                         (params.chunks.length / kBlockTokens) *
                         divide_up(params.x.width, Shape::kColumns);
  prim::launch(
      "mlstm_out", mlstm_out<kUse, kPlanes>,
      {static_cast<prim::u32>(blocks), kTwoPhaseThreads, Shape::shared_bytes(params.stages)},
      params, stream);
}

template <int kPlanes>
void launch_out_planes(Use use, const SweepParams& params, const DeviceLimits& device,
                       Stream stream) {
  switch (use) {
    case Use::kH:
      return launch_out_use<Use::kH, kPlanes>(params, device, stream);
    case Use::kDv:
      return launch_out_use<Use::kDv, kPlanes>(params, device, stream);
    case Use::kDq:
      return launch_out_use<Use::kDq, kPlanes>(params, device, stream);
    case Use::kDk:
      return launch_out_use<Use::kDk, kPlanes>(params, device, stream);
  }
}

}  // namespace xlstm::cuda
