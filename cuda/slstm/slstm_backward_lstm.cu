#include "cuda/slstm/slstm_backward_launch.cuh"

template void xlstm::cuda::launch_slstm_backward<1>(const SlstmMap&, const SlstmBackwardParams&,
                                                    Stream);
