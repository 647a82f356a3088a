#pragma once
// Defines launch_sweep_sm90_tile; one translation unit per use instantiates it, so that they compile in parallel.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {

template <Use kUse, int kDA, int kDX>
void launch_sweep_sm90_kernel(const SweepSm90Params& p, Stream stream) {
  const Chunks& chunks = p.sweep.chunks;
  prim::LaunchShape shape;
  shape.blocks = static_cast<u32>(chunks.num_sequences) * static_cast<u32>(chunks.num_heads) *
                 static_cast<u32>(chunks.segments) *
                 static_cast<u32>(divide_up(p.sweep.x.width, kDX));
  shape.threads = 384;
  shape.shared_bytes = sizeof(SweepSm90Shared<kUse, kDA, kDX>);
  static_assert(sizeof(SweepSm90Shared<kUse, kDA, kDX>) <= kSweepSm90SharedBytes,
                "shared memory of a block");
  prim::launch("mlstm_sweep_sm90", mlstm_sweep_sm90<kUse, kDA, kDX>, shape, p, stream);
}

template <Use kUse>
void launch_sweep_sm90_tile(const SweepSm90Params& p, Stream stream) {
  const bool narrow = sweep_sm90_tile_columns(p.sweep.x.width) == 64;
  if (p.sweep.a.width <= 64) {
    narrow ? launch_sweep_sm90_kernel<kUse, 64, 64>(p, stream)
           : launch_sweep_sm90_kernel<kUse, 64, 128>(p, stream);
  } else {
    narrow ? launch_sweep_sm90_kernel<kUse, 128, 64>(p, stream)
           : launch_sweep_sm90_kernel<kUse, 128, 128>(p, stream);
  }
}

}  // namespace xlstm::cuda
