#include "cuda/slstm/slstm_forward_launch.cuh"

template void xlstm::cuda::launch_slstm_forward<xlstm::cuda::SlstmCell::kSlstmExpf>(
    const SlstmMap&, const SlstmForwardParams&, Stream);
