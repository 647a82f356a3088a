#pragma once
// The mLSTM in ATen calls alone, on any device and in any dtype: batched matrix products over chunks. What runs where no
// kernel of cuda/mlstm does (float64, old devices, libraries built without nvcc), and a second path for tests.
//
// Computes in float32, for float64 in float64, never in TF32; gates and their sums in float64. Without reset and
// cu_seqlens nothing is read back from the device; with them both are copied to the host, which waits for the device
// and cannot be captured in a CUDA graph.
#include "csrc/ops/mlstm_arguments.h"

namespace xlstm::ops {

/// As mlstm_chunkwise_forward; product is filled whatever `normalize`.
MlstmResults mlstm_generic_forward(const MlstmArguments& a);

/// As mlstm_chunkwise_backward.
MlstmGradients mlstm_generic_backward(const MlstmBackwardArguments& a);

/// As mlstm_step.
at::Tensor mlstm_generic_step(const MlstmStepArguments& a);

/// As mlstm_step_lazy and mlstm_fold; the CPU takes them too.
at::Tensor mlstm_generic_step_lazy(const MlstmLazyArguments& a);
void mlstm_generic_fold(const MlstmFoldArguments& a);

}  // namespace xlstm::ops
