#include "cuda/mlstm/hopper/mlstm_twophase_launch_sm90.h"
#include "cuda/mlstm/mlstm_launch.h"
#include "cuda/mlstm/mlstm_out_launch.cuh"

namespace xlstm::cuda {

// mlstm_out_split.cu
extern template void launch_out_planes<2>(Use, const SweepParams&, const DeviceLimits&, Stream);

static_assert(OutShape<1>::kColumns == kDotTile, "the kernel for sm_90a fills as many numbers");

int out_tile_columns(Dtype dtype, const DeviceLimits&) {
  return dtype == Dtype::kBFloat16 ? OutShape<1>::kColumns : OutShape<2>::kColumns;
}

void launch_out(Use use, const SweepParams& params, const DeviceLimits& device, Stream stream) {
  if (out_sm90_takes(params, device)) {
    launch_out_sm90(use, params, device, stream);
  } else if (params.a.dtype == Dtype::kBFloat16) {
    launch_out_planes<1>(use, params, device, stream);
  } else {
    launch_out_planes<2>(use, params, device, stream);
  }
}

}  // namespace xlstm::cuda
