#include "cuda/mlstm/hopper/mlstm_out_sm90.cuh"

#include "cuda/mlstm/hopper/mlstm_maps_sm90.h"
#include "cuda/mlstm/hopper/mlstm_twophase_launch_sm90.h"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {
namespace {

template <Use kUse, int kColumns>
void launch_tiles(const SweepParams& params, const DeviceLimits& device, Stream stream) {
  using Shape = OutShapeSm90<kColumns>;
  const Chunks& c = params.chunks;
  const prim::TensorMap a = operand_tensor_map(params.a, c);
  OutParamsSm90 p{params,
                  a,
                  operand_tensor_map(params.b, c),
                  operand_tensor_map(params.x, c),
                  params.dots == nullptr ? a : operand_tensor_map(params.dot, c),
                  state_tensor_map(params.states, padded(params.dqk), padded(params.dv),
                                   int64_t{c.num_heads} * c.slots, kBoxRows),
                  0,
                  divide_up(params.a.width, 64),
                  false};
  p.resident = p.slices <= Shape::kSlots;
  p.tiles = c.slots * c.num_heads * divide_up(c.length, Shape::kRows) *
            divide_up(params.x.width, Shape::kColumns);
  int blocks = p.tiles < device.num_multiprocessors ? p.tiles : device.num_multiprocessors;
  // The last rows of a chunk are the most work in one direction, the first in the other. An odd number of blocks deals
  // both out to all of them.
  if (blocks < p.tiles && blocks > 1 && blocks % 2 == 0) --blocks;
  prim::launch("mlstm_out_sm90", mlstm_out_sm90<kUse, kColumns>,
               {static_cast<u32>(blocks), kTwoPhaseSm90Threads, sizeof(typename Shape::Shared)}, p,
               stream);
}

/// With tiles of 192 columns where as many do: less of them lies beyond the last column.
template <Use kUse>
void launch_use(const SweepParams& params, const DeviceLimits& device, Stream stream) {
  if (divide_up(params.x.width, 192) == divide_up(params.x.width, 256))
    return launch_tiles<kUse, 192>(params, device, stream);
  launch_tiles<kUse, 256>(params, device, stream);
}

}  // namespace

bool out_sm90_takes(const SweepParams& params, const DeviceLimits& device) {
  const auto covers = [&](const Operand& x) { return tensor_map_covers(x, params.chunks); };
  return device.hopper && sizeof(OutShapeSm90<256>::Shared) <= device.shared_bytes &&
         covers(params.a) && covers(params.b) && covers(params.x) &&
         (params.dots == nullptr || covers(params.dot));
}

void launch_out_sm90(Use use, const SweepParams& params, const DeviceLimits& device,
                     Stream stream) {
  switch (use) {
    case Use::kH:
      return launch_use<Use::kH>(params, device, stream);
    case Use::kDv:
      return launch_use<Use::kDv>(params, device, stream);
    case Use::kDq:
      return launch_use<Use::kDq>(params, device, stream);
    case Use::kDk:
      return launch_use<Use::kDk>(params, device, stream);
  }
}

}  // namespace xlstm::cuda
