#pragma once
// Defines launch_sweep_sm90_tile and launch_sweep_sm90_wide_tile; one translation unit per use instantiates each, so that
// they compile in parallel.
#include "cuda/mlstm/hopper/mlstm_sweep_sm90.cuh"
#include "cuda/mlstm/hopper/mlstm_sweep_sm90_wide.cuh"
#include "cuda/prim/launch.h"

namespace xlstm::cuda {

/// Blocks of `columns` columns of X each.
template <class Shared>
prim::LaunchShape sweep_sm90_shape(const SweepParams& p, int columns) {
  const Chunks& chunks = p.chunks;
  prim::LaunchShape shape;
  shape.blocks = static_cast<u32>(chunks.num_sequences) * static_cast<u32>(chunks.num_heads) *
                 static_cast<u32>(chunks.segments) *
                 static_cast<u32>(divide_up(p.x.width, columns));
  shape.threads = kSweepSm90Threads;
  shape.shared_bytes = sizeof(Shared);
  static_assert(sizeof(Shared) <= kSweepSm90SharedBytes, "shared memory of a block");
  return shape;
}

template <Use kUse, int kDA, int kDX>
void launch_sweep_sm90_kernel(const SweepSm90Params& p, Stream stream) {
  prim::launch("mlstm_sweep_sm90", mlstm_sweep_sm90<kUse, kDA, kDX>,
               sweep_sm90_shape<SweepSm90Shared<kUse, kDA, kDX>>(p.sweep, kDX), p, stream);
}

template <Use kUse>
void launch_sweep_sm90_wide_tile(const SweepSm90Params& p, Stream stream) {
  prim::launch("mlstm_sweep_sm90_wide", mlstm_sweep_sm90_wide<kUse>,
               sweep_sm90_shape<SweepSm90WideShared>(p.sweep, 2 * SweepSm90WideShared::kColumns), p,
               stream);
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
