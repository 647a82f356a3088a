#include "cuda/mlstm/mlstm_state.cuh"

#include "cuda/mlstm/hopper/mlstm_twophase_launch_sm90.h"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

template <int kPlanes>
void launch_planes(StateParams params, const DeviceLimits& device, Stream stream) {
  using Shape = StateShape<kPlanes>;
  constexpr int kMostStages = kPlanes == 1 ? 3 : 2;
  params.stages = choose_stages(kMostStages, Shape::shared_bytes, device);
  const int64_t items =
      int64_t{params.chunks.num_sequences} * params.chunks.num_heads * params.chunks.segments;
  const int64_t tiles = divide_up(params.dqk, Shape::kRows) * divide_up(params.dv, Shape::kColumns);
  prim::launch(
      "mlstm_state", mlstm_state<kPlanes>,
      {static_cast<prim::u32>(items * tiles), kTwoPhaseThreads, Shape::shared_bytes(params.stages)},
      params, stream);
}

}  // namespace

void launch_state(const StateParams& params, const DeviceLimits& device, Stream stream) {
  if (state_sm90_takes(params, device)) {
    launch_state_sm90(params, stream);
  } else if (params.b.dtype == Dtype::kBFloat16) {
    launch_planes<1>(params, device, stream);
  } else {
    launch_planes<2>(params, device, stream);
  }
}

}  // namespace xlstm::cuda
