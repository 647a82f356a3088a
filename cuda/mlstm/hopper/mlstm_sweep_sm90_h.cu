#include "cuda/mlstm/hopper/mlstm_sweep_sm90_launch.cuh"

template void xlstm::cuda::launch_sweep_sm90_tile<xlstm::cuda::Use::kH>(const SweepSm90Params&,
                                                                        Stream);
