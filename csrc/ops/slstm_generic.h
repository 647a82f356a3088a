#pragma once
// The sLSTM and LSTM in ATen calls alone, on any device and in any dtype: one batched product and a few pointwise calls
// per time step. What runs where no kernel of cuda/slstm does (float64, old devices, libraries built without nvcc), and a
// second path for tests.
//
// Computes in float32, for float64 in float64, never in TF32; y enters the recurrent product rounded to wx's dtype, as on
// CUDA. Nothing is read back from the device but cu_seqlens: with it the call waits for the device and cannot be captured
// in a CUDA graph.
#include "csrc/ops/slstm_arguments.h"

namespace xlstm::ops {

/// As slstm_forward with preactivations; without `saved`, gates and checkpoints are undefined. The backward below does
/// not read checkpoints: they are NaN.
SlstmResults slstm_generic_forward(const SlstmArguments& a, bool saved);

/// As slstm_backward, of gates kept as preactivations or none.
SlstmGradients slstm_generic_backward(const SlstmBackwardArguments& a);

}  // namespace xlstm::ops
