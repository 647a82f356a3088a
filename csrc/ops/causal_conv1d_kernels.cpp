#include "csrc/ops/causal_conv1d_kernels.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "csrc/ops/kernel_tensors.h"
#include "cuda/causal_conv1d/causal_conv1d_launch.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

/// (B,T,C), (N,W-1,C) or, without T, (B,C).
cuda::ConvView conv_view_of(const Tensor& x) {
  return {kernel_data(x), x.stride(0), x.dim() == 3 ? x.stride(1) : 0, x.stride(-1)};
}

cuda::ConvParameters parameters_of(const Tensor& weight, const OptionalTensor& bias, bool silu) {
  cuda::ConvParameters p;
  p.channels = static_cast<int32_t>(weight.size(0));
  p.width = static_cast<int32_t>(weight.size(1));
  p.silu = silu;
  p.weight = weight.const_data_ptr();
  p.weight_channel = weight.stride(0);
  p.weight_tap = weight.stride(1);
  p.weight_dtype = kernel_dtype(weight.scalar_type());
  if (bias) {
    p.bias = bias->const_data_ptr();
    p.bias_channel = bias->stride(0);
    p.bias_dtype = kernel_dtype(bias->scalar_type());
  }
  return p;
}

/// What both directions read. Keeps alive what had to be converted.
struct Call {
  Call(const CausalConv1dArguments& arguments, const CausalConv1dSizes& sizes) : a(arguments) {
    a.weight = kernel_parameter(a.weight);
    if (a.bias) a.bias = kernel_parameter(*a.bias);
    if (a.state0) a.state0 = a.state0->to(a.x.scalar_type());
    a.cu_seqlens = kernel_offsets(a.cu_seqlens, sizes.time);
    in.dtype = kernel_dtype(a.x.scalar_type());
    in.batch = static_cast<int32_t>(sizes.batch);
    in.time = static_cast<int32_t>(sizes.time);
    in.num_sequences = static_cast<int32_t>(sizes.num_sequences);
    in.parameters = parameters_of(a.weight, a.bias, a.silu);
    in.x = conv_view_of(a.x);
    if (a.state0) in.state0 = conv_view_of(*a.state0);
    set_documents(in, a.reset, a.cu_seqlens);
  }

  CausalConv1dArguments a;
  cuda::ConvInputs in;
};

}  // namespace

std::string causal_conv1d_kernels_lack(const CausalConv1dSizes& sizes, at::ScalarType dtype) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (dtype == at::kDouble) return "no kernels for float64";
  // A block does at least 32 tokens of 128 channels; strips of tokens, and the taps of all channels with their biases, are
  // numbered in 32 bits.
  if (sizes.time > kMost / 2 || sizes.channels > kMost / 9 || sizes.num_sequences > kMost / 2 ||
      sizes.batch * (sizes.time / 32 + 1) > kMost / (sizes.channels / 128 + 1))
    return "no kernels for tensors this large";
  return "";
}

CausalConv1dOutputs causal_conv1d_kernels_forward(const CausalConv1dArguments& a,
                                                  const CausalConv1dSizes& sizes,
                                                  cuda::Stream stream) {
  const Call call(a, sizes);
  const Tensor y = at::empty(a.x.sizes(), a.x.options());
  const Tensor state =
      at::empty({sizes.num_sequences, sizes.width - 1, sizes.channels}, a.x.options());
  run_kernels("causal_conv1d", [&] {
    cuda::causal_conv1d_forward({call.in, conv_view_of(y), conv_view_of(state)}, stream);
  });
  return {y, state};
}

CausalConv1dGradients causal_conv1d_kernels_backward(const CausalConv1dArguments& a,
                                                     const CausalConv1dSizes& sizes,
                                                     const OptionalTensor& dy,
                                                     const OptionalTensor& dstate,
                                                     cuda::Stream stream) {
  const Call call(a, sizes);
  const auto in_dtype = [&a](const OptionalTensor& x) {
    return x ? OptionalTensor(x->to(a.x.scalar_type())) : std::nullopt;
  };
  const OptionalTensor upstream = in_dtype(dy), last = in_dtype(dstate);
  const Tensor dx = at::empty(a.x.sizes(), a.x.options());
  const Tensor dstate0 =
      at::empty(a.state0 ? a.state0->sizes() : at::IntArrayRef{0}, a.x.options());
  const Tensor dweight = at::empty(a.weight.sizes(), call.a.weight.options());
  const Tensor dbias =
      a.bias ? at::empty(a.bias->sizes(), call.a.bias->options()) : at::empty({0}, a.x.options());
  const Tensor partials =
      at::empty({cuda::causal_conv1d_partials(call.in)}, a.x.options().dtype(at::kFloat));
  cuda::ConvBackwardParams p;
  p.in = call.in;
  if (upstream) p.dy = conv_view_of(*upstream);
  if (last) p.dstate = conv_view_of(*last);
  p.dx = conv_view_of(dx);
  if (a.state0) p.dstate0 = conv_view_of(dstate0);
  p.dweight = dweight.mutable_data_ptr();
  if (a.bias) p.dbias = dbias.mutable_data_ptr();
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  run_kernels("causal_conv1d_backward", [&] { cuda::causal_conv1d_backward(p, stream); });
  return {dx, dweight.to(a.weight.scalar_type()), a.bias ? dbias.to(a.bias->scalar_type()) : dbias,
          a.state0 ? dstate0.to(a.state0->scalar_type()) : dstate0};
}

Tensor causal_conv1d_kernels_step(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  Tensor& state, bool silu, cuda::Stream stream) {
  const Tensor own_weight = kernel_parameter(weight);
  const OptionalTensor own_bias = bias ? OptionalTensor(kernel_parameter(*bias)) : std::nullopt;
  const Tensor y = at::empty(x.sizes(), x.options());
  cuda::ConvStepParams p;
  p.dtype = kernel_dtype(x.scalar_type());
  p.batch = static_cast<int32_t>(x.size(0));
  p.parameters = parameters_of(own_weight, own_bias, silu);
  p.x = conv_view_of(x);
  p.state = conv_view_of(state);
  p.y = conv_view_of(y);
  run_kernels("causal_conv1d_step", [&] { cuda::causal_conv1d_step(p, stream); });
  return y;
}

}  // namespace xlstm::ops
