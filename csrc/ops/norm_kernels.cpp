#include "csrc/ops/norm_kernels.h"

#include <ATen/ops/empty.h>

#include <limits>
#include <vector>

#include "csrc/ops/kernel_tensors.h"
#include "csrc/ops/rows.h"
#include "cuda/norm/headwise_norm.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

/// Replaces x by a packed copy where its rows need more than two strides.
cuda::RowView row_view(Tensor& x, int64_t trailing = 1) {
  const cpu::Rows rows = rows_of(x, trailing);
  return {const_cast<void*>(rows.data), rows.inner_rows, rows.inner_stride, rows.outer_stride};
}

/// What both directions read. Keeps alive what had to be converted.
struct Call {
  Call(const HeadwiseNormArguments& a, const cuda::DeviceLimits& limits) : x(a.x) {
    in.heads = static_cast<int32_t>(x.size(-2));
    in.dim = static_cast<int32_t>(x.size(-1));
    in.rows = x.numel() / (x.size(-2) * x.size(-1));
    in.dtype = kernel_dtype(x.scalar_type());
    in.eps = static_cast<float>(a.eps);
    in.rms = a.is_rms(), in.sigmoid_gate = a.is_sigmoid();
    in.x = row_view(x, 2);
    in.x_head = x.stride(-2);
    if (a.skip) skip = a.skip->to(x.scalar_type()), in.skip = row_view(skip);
    if (a.gate) gate = a.gate->to(x.scalar_type()), in.gate = row_view(gate);
    in.weight = parameter_of(a.weight, weight);
    in.bias = parameter_of(a.bias, bias);
    in.skip_weight = parameter_of(a.skip_weight, skip_weight);
    in.num_multiprocessors = limits.num_multiprocessors;
  }

  cuda::HeadwiseNormInputs in;
  Tensor x, skip, gate, weight, bias, skip_weight;

 private:
  static cuda::NormParameter parameter_of(const OptionalTensor& given, Tensor& kept) {
    if (!given) return {};
    kept = kernel_parameter(*given).contiguous();
    return {kept.const_data_ptr(), kernel_dtype(kept.scalar_type())};
  }
};

/// terms: what a.x is to become the sum of, or none.
Tensor run_forward(const HeadwiseNormArguments& a, std::vector<Tensor> terms, cuda::Stream stream,
                   const cuda::DeviceLimits& limits) {
  const Call call(a, limits);
  const Tensor y = at::empty(headwise_norm_sizes(a.x), a.x.options());
  cuda::HeadwiseNormForward p;
  p.in = call.in;
  p.y = y.mutable_data_ptr();
  for (size_t i = 0; i < terms.size(); ++i)
    p.terms[i] = {row_view(terms[i]), kernel_dtype(terms[i].scalar_type())};
  run_kernels(a.op.data(), [&] { cuda::headwise_norm_forward(p, stream); });
  return y;
}

}  // namespace

std::string headwise_norm_kernels_lack(const Tensor& x) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (x.scalar_type() == at::kDouble) return "no kernels for float64";
  if (x.size(-2) * x.size(-1) == 0) return "no channels";
  // A block does at least one row of one head; blocks and channels are numbered in 32 bits.
  if (x.size(-2) * x.size(-1) > kMost / 4) return "no kernels for tensors this large";
  return "";
}

Tensor headwise_norm_kernels_forward(const HeadwiseNormArguments& a, cuda::Stream stream,
                                     const cuda::DeviceLimits& limits) {
  return run_forward(a, {}, stream, limits);
}

Tensor residual_norm_kernels_forward(const Tensor& x, const Tensor& branch,
                                     const HeadwiseNormArguments& a, cuda::Stream stream,
                                     const cuda::DeviceLimits& limits) {
  return run_forward(a, {x, branch}, stream, limits);
}

HeadwiseNormGradients headwise_norm_kernels_backward(const Tensor& dy,
                                                     const HeadwiseNormArguments& a,
                                                     cuda::Stream stream,
                                                     const OptionalTensor& dsum,
                                                     const cuda::DeviceLimits& limits) {
  const Call call(a, limits);
  Tensor upstream = dy.to(a.x.scalar_type()), past;
  const auto like = [&a](const OptionalTensor& input, at::ScalarType type) {
    return at::empty(input ? input->sizes() : at::IntArrayRef{0}, a.x.options().dtype(type));
  };
  const auto like_parameter = [&](const OptionalTensor& input, const Tensor& kept) {
    return like(input, input ? kept.scalar_type() : a.x.scalar_type());
  };
  const at::ScalarType type = a.x.scalar_type();
  const Tensor dx = at::empty(a.x.sizes(), a.x.options());
  const Tensor dskip = like(a.skip, type), dgate = like(a.gate, type);
  const Tensor dweight = like_parameter(a.weight, call.weight);
  const Tensor dbias = like_parameter(a.bias, call.bias);
  const Tensor dskip_weight = like_parameter(a.skip_weight, call.skip_weight);
  const Tensor partials =
      at::empty({cuda::headwise_norm_partials(call.in)}, a.x.options().dtype(at::kFloat));
  cuda::HeadwiseNormBackward p;
  p.in = call.in;
  p.dy = row_view(upstream);
  if (dsum) past = dsum->to(a.x.scalar_type()), p.dsum = row_view(past);
  p.dx = dx.mutable_data_ptr();
  if (a.skip) p.dskip = dskip.mutable_data_ptr(), p.dskip_weight = dskip_weight.mutable_data_ptr();
  if (a.gate) p.dgate = dgate.mutable_data_ptr();
  if (a.weight) p.dweight = dweight.mutable_data_ptr();
  if (a.bias) p.dbias = dbias.mutable_data_ptr();
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  run_kernels(a.op.data(), [&] { cuda::headwise_norm_backward(p, stream); });
  const auto as_given = [](const OptionalTensor& input, const Tensor& grad) {
    return input ? grad.to(input->scalar_type()) : grad;
  };
  return {dx,
          as_given(a.weight, dweight),
          as_given(a.bias, dbias),
          as_given(a.skip, dskip),
          as_given(a.skip_weight, dskip_weight),
          as_given(a.gate, dgate)};
}

}  // namespace xlstm::ops
