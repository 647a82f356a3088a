#include "cuda/mlstm/hopper/mlstm_state_sm90.cuh"

#include "cuda/mlstm/hopper/mlstm_maps_sm90.h"
#include "cuda/mlstm/hopper/mlstm_twophase_launch_sm90.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {

bool state_sm90_takes(const StateParams& params, const DeviceLimits& device) {
  return device.hopper && sizeof(StateShapeSm90::Shared) <= device.shared_bytes &&
         tensor_map_covers(params.b, params.chunks) && tensor_map_covers(params.x, params.chunks);
}

void launch_state_sm90(const StateParams& params, Stream stream) {
  using Shape = StateShapeSm90;
  const Chunks& c = params.chunks;
  const prim::TensorMap x = operand_tensor_map(params.x, c);
  const StateParamsSm90 p{
      params, operand_tensor_map(params.b, c), x,
      params.states == nullptr
          ? x
          : state_tensor_map(params.states, padded(params.dqk), padded(params.dv),
                             int64_t{c.num_heads} * c.slots, StateShapeSm90::kWarpRows)};
  const int64_t items =
      int64_t{params.chunks.num_sequences} * params.chunks.num_heads * params.chunks.segments;
  const int64_t tiles = divide_up(params.dqk, Shape::kRows) * divide_up(params.dv, Shape::kColumns);
  prim::launch("mlstm_state_sm90", mlstm_state_sm90,
               {static_cast<u32>(items * tiles), kTwoPhaseSm90Threads, sizeof(Shape::Shared)}, p,
               stream);
}

}  // namespace xlstm::cuda
