#include "csrc/ops/norm_generic.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sigmoid.h>

#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using at::Tensor;

/// Everything in the type of accumulation, as rows: (R,NH,DH), and (R,NH*DH) for skip and gate.
struct Rows {
  explicit Rows(const HeadwiseNormArguments& arguments) : a(arguments) {
    accumulate = accumulate_type(a.x.scalar_type());
    heads = a.x.size(-2), dim = a.x.size(-1);
    const Tensor x = a.x.to(accumulate).reshape({a.x.numel() / (heads * dim), heads, dim});
    const Tensor centred = a.is_rms() ? x : x - x.mean(-1, /*keepdim=*/true);
    rstd = ((centred * centred).mean(-1, true) + a.eps).rsqrt();
    normed = centred * rstd;
    value = normed.flatten(1);
    if (a.weight) value = value * as_parameter(*a.weight);
    if (a.bias) value = value + as_parameter(*a.bias);
    if (a.skip) skip = as_rows(*a.skip), value = value + skip * as_parameter(*a.skip_weight);
    if (a.gate) gate = as_rows(*a.gate), sigmoid = gate.sigmoid();
  }
  Tensor as_parameter(const Tensor& x) const { return x.to(accumulate); }
  /// Rounded to x's type, as the kernels read it.
  Tensor as_rows(const Tensor& x) const {
    return x.to(a.x.scalar_type()).to(accumulate).reshape({normed.size(0), heads * dim});
  }
  Tensor activation() const { return a.is_sigmoid() ? sigmoid : gate * sigmoid; }
  Tensor slope() const {
    const Tensor s = sigmoid * (1 - sigmoid);
    return a.is_sigmoid() ? s : sigmoid + gate * s;
  }

  const HeadwiseNormArguments& a;
  at::ScalarType accumulate;
  int64_t heads, dim;
  Tensor normed, rstd;         // (R,NH,DH), (R,NH,1)
  Tensor value;                // before the gate
  Tensor skip, gate, sigmoid;  // undefined where absent
};

Tensor rounded(const Tensor& x, at::IntArrayRef sizes, at::ScalarType through, at::ScalarType to) {
  return x.reshape(sizes).to(through).to(to);
}

}  // namespace

Tensor headwise_norm_generic(const HeadwiseNormArguments& a) {
  const at::DimVector sizes = headwise_norm_sizes(a.x);
  if (a.x.numel() == 0) return at::empty(sizes, a.x.options());
  const Rows r(a);
  return (a.gate ? r.value * r.activation() : r.value).to(a.x.scalar_type()).reshape(sizes);
}

HeadwiseNormGradients headwise_norm_generic_backward(const Tensor& dy,
                                                     const HeadwiseNormArguments& a) {
  const auto zeros_like = [&a](const OptionalTensor& x) {
    return x ? at::empty(x->sizes(), x->options()).zero_() : at::empty({0}, a.x.options());
  };
  Tensor dweight = zeros_like(a.weight), dbias = zeros_like(a.bias), dskip = zeros_like(a.skip);
  Tensor dskip_weight = zeros_like(a.skip_weight), dgate = zeros_like(a.gate);
  if (a.x.numel() == 0)
    return {at::empty(a.x.sizes(), a.x.options()), dweight, dbias, dskip, dskip_weight, dgate};
  const Rows r(a);
  const at::ScalarType type = a.x.scalar_type();
  Tensor d = r.as_rows(dy);  // gradient of value
  if (a.gate) {
    dgate = rounded(d * r.value * r.slope(), a.gate->sizes(), type, a.gate->scalar_type());
    d = d * r.activation();
  }
  if (a.skip) {
    dskip =
        rounded(d * r.as_parameter(*a.skip_weight), a.skip->sizes(), type, a.skip->scalar_type());
    dskip_weight = (d * r.skip).sum(0).to(a.skip_weight->scalar_type());
  }
  if (a.bias) dbias = d.sum(0).to(a.bias->scalar_type());
  if (a.weight) {
    dweight = (d * r.normed.flatten(1)).sum(0).to(a.weight->scalar_type());
    d = d * r.as_parameter(*a.weight);
  }
  const Tensor g = d.reshape(r.normed.sizes());
  Tensor dx = g - r.normed * (g * r.normed).mean(-1, true);
  if (!a.is_rms()) dx = dx - g.mean(-1, true);
  return {
      rounded(dx * r.rstd, a.x.sizes(), type, type), dweight, dbias, dskip, dskip_weight, dgate};
}

ResidualNormResult residual_norm_generic(const Tensor& x, const Tensor& branch,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         double eps, std::string_view kind) {
  const Tensor sum = x + branch;
  return {sum, headwise_norm_generic(SumNorm(sum, weight, bias, eps, kind).arguments())};
}

ResidualNormGradients residual_norm_generic_backward(const OptionalTensor& dsum, const Tensor& dy,
                                                     const Tensor& sum,
                                                     const HeadwiseNormArguments& a) {
  auto [dx, dweight, dbias] = residual_gradients(sum, headwise_norm_generic_backward(dy, a));
  return {dsum ? dx + dsum->to(dx.scalar_type()) : dx, dweight, dbias};
}

}  // namespace xlstm::ops
