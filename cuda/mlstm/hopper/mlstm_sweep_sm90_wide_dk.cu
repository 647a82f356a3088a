#include "cuda/mlstm/hopper/mlstm_sweep_sm90_launch.cuh"

template void xlstm::cuda::launch_sweep_sm90_wide_tile<xlstm::cuda::Use::kDk>(
    const SweepSm90Params&, Stream);
