#include "cuda/mlstm/mlstm_sweep_launch.cuh"

template void xlstm::cuda::launch_sweep_tile<xlstm::cuda::Use::kDk>(const SweepTile&,
                                                                    const SweepParams&, Stream);
