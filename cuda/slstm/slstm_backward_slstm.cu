#include "cuda/slstm/slstm_backward_launch.cuh"

template void xlstm::cuda::launch_slstm_backward<xlstm::cuda::SlstmCell::kSlstm>(
    const SlstmMap&, const SlstmBackwardParams&, Stream);
