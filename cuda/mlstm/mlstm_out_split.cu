// The out kernel with two planes per number: float32 and float16 inputs.
#include "cuda/mlstm/mlstm_out_launch.cuh"

namespace xlstm::cuda {

template void launch_out_planes<2>(Use, const SweepParams&, const DeviceLimits&, Stream);

}  // namespace xlstm::cuda
