#pragma once
// Parameters of the causal convolution's kernels. Per sequence and channel, with x_t = state0[W-1+t] for t < 0 (0 without
// a start state), W the width and w the channel's weights:
//   a_t = bias + sum_{j < seen_t} w[W-1-j] x_{t-j}        y_t = a_t or a_t sigmoid(a_t)
// where seen_t <= W counts the inputs back to the last reset (itself a token that is seen) or, without a start state, to
// the sequence's begin. What is not seen is not read: a NaN there changes nothing. The final state holds the last W-1
// inputs, 0 for those before the last reset. Backward, with d_t = dy_t (dy_t times the slope of SiLU at a_t):
//   dx_s        = sum_{j: j < seen_{s+j}} w[W-1-j] d_{s+j}  + the gradient of s's row in the final state
//   dw[W-1-j]   = sum_{t: j < seen_t} d_t x_{t-j}           dbias = sum_t d_t
//   dstate0[k]  = dx of position k-(W-1)
#include "cuda/tensors.h"

namespace xlstm::cuda {

/// A (B,T,C) tensor or (N,W-1,C) states. Strides in elements. Null where absent.
struct ConvView {
  void* data = nullptr;
  int64_t batch = 0, time = 0, channel = 1;
};

/// weight (C,W), bias (C); types of their own.
struct ConvParameters {
  int32_t channels = 0, width = 0;  ///< C, W of 2 to 8
  bool silu = false;
  const void* weight = nullptr;
  int64_t weight_channel = 0, weight_tap = 1;  ///< strides
  Dtype weight_dtype = Dtype::kFloat32;
  const void* bias = nullptr;  ///< null: none
  int64_t bias_channel = 1;
  Dtype bias_dtype = Dtype::kFloat32;
};

/// What both directions read.
struct ConvInputs {
  Dtype dtype = Dtype::kFloat32;  ///< of x, y, the states and their gradients
  int32_t batch = 0, time = 0;
  ConvParameters parameters;
  ConvView x, state0;
  const bool* reset = nullptr;  ///< (B,T) or null
  int64_t reset_batch = 0, reset_time = 0;
  /// (N+1) on the device, rising from 0 to T, B = 1; null: a sequence per batch row
  const int32_t* cu_seqlens = nullptr;
  int32_t num_sequences = 0;
};

struct ConvForwardParams {
  ConvInputs in;
  ConvView y, state;
};

struct ConvBackwardParams {
  ConvInputs in;
  ConvView dy, dstate;  ///< null: zero
  ConvView dx;
  ConvView dstate0;           ///< null: not wanted
  void* dweight = nullptr;    ///< (C,W) contiguous, in weight_dtype
  void* dbias = nullptr;      ///< (C) contiguous, in bias_dtype; null: not wanted
  float* partials = nullptr;  ///< causal_conv1d_partials(in) numbers of scratch memory
};

/// One token; the state is shifted in place.
struct ConvStepParams {
  Dtype dtype = Dtype::kFloat32;
  int32_t batch = 0;
  ConvParameters parameters;
  ConvView x, state, y;  ///< x, y (B,C): time is not used
};

}  // namespace xlstm::cuda
