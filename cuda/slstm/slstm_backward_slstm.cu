// Both cells of the sLSTM: what tells them apart is in the slopes.
#include "cuda/slstm/slstm_backward_launch.cuh"

template void xlstm::cuda::launch_slstm_backward<3>(const SlstmMap&, const SlstmBackwardParams&,
                                                    Stream);
