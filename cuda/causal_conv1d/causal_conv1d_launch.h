#pragma once
// The causal convolution on CUDA: only launches on the given stream, in an order that depends on sizes alone. Throw
// std::runtime_error where a launch fails.
#include "cuda/causal_conv1d/causal_conv1d_params.h"

namespace xlstm::cuda {

void causal_conv1d_forward(const ConvForwardParams& params, Stream stream);

/// float32 numbers of scratch memory that the backward pass needs.
int64_t causal_conv1d_partials(const ConvInputs& in);
void causal_conv1d_backward(const ConvBackwardParams& params, Stream stream);

void causal_conv1d_step(const ConvStepParams& params, Stream stream);

}  // namespace xlstm::cuda
