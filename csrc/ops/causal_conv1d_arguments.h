#pragma once
// Arguments of the causal convolution, checked for any device.
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace xlstm::ops {

using OptionalTensor = std::optional<at::Tensor>;

struct CausalConv1dArguments {
  at::Tensor x, weight;
  OptionalTensor bias, state0, reset, cu_seqlens;
  bool silu = false;
};

struct CausalConv1dSizes {
  int64_t batch = 0, time = 0, channels = 0, width = 0;
  int64_t num_sequences = 0;  // B, or N with cu_seqlens
};

/// y, state
using CausalConv1dOutputs = std::tuple<at::Tensor, at::Tensor>;
/// dx, dweight, dbias, dstate0
using CausalConv1dGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Throw c10::Error naming the argument whose device is not x's.
void check_causal_conv1d_devices(const CausalConv1dArguments& a);
void check_causal_conv1d_step_devices(const at::Tensor& x, const at::Tensor& weight,
                                      const OptionalTensor& bias, const at::Tensor& state);

/// Throw c10::Error naming the argument where a rank, size, dtype, device or value is wrong. Values of cu_seqlens are
/// not looked at.
CausalConv1dSizes check_causal_conv1d(const CausalConv1dArguments& a);
void check_causal_conv1d_gradients(const CausalConv1dArguments& a, const CausalConv1dSizes& sizes,
                                   const OptionalTensor& dy, const OptionalTensor& dstate);
/// num_sequences is B, time 1.
CausalConv1dSizes check_causal_conv1d_step(const at::Tensor& x, const at::Tensor& weight,
                                           const OptionalTensor& bias, const at::Tensor& state);

}  // namespace xlstm::ops
