#include "csrc/ops/norm_arguments.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

void check_channels(const HeadwiseNormArguments& a, const OptionalTensor& tensor,
                    std::string_view name) {
  if (!tensor) return;
  check_shape(a.op, name, *tensor, {a.x.size(-2) * a.x.size(-1)}, "(NH*DH)");
}

}  // namespace

at::DimVector headwise_norm_sizes(const at::Tensor& x) {
  at::DimVector sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.back() *= x.size(-1);
  return sizes;
}

void check_headwise_rows(const HeadwiseNormArguments& a, const at::Tensor& tensor,
                         std::string_view name) {
  check_shape(a.op, name, tensor, c10::fromIntArrayRefSlow(headwise_norm_sizes(a.x)),
              "(...,NH*DH)");
  check_device(a.op, name, tensor, a.x.device());
}

void check_headwise_norm_devices(const HeadwiseNormArguments& a) {
  check_devices(a.op, a.x.device(),
                {{"weight", a.weight},
                 {"bias", a.bias},
                 {"skip", a.skip},
                 {"skip_weight", a.skip_weight},
                 {"gate", a.gate}});
}

void check_headwise_norm(const HeadwiseNormArguments& a) {
  check_headwise_norm_devices(a);
  TORCH_CHECK(a.x.dim() >= 2, a.op, ": x: expected (...,NH,DH), got shape ", a.x.sizes());
  check_floating(a.op, {{"x", a.x},
                        {"weight", a.weight},
                        {"bias", a.bias},
                        {"skip", a.skip},
                        {"skip_weight", a.skip_weight},
                        {"gate", a.gate}});
  TORCH_CHECK(a.kind == "layer" || a.kind == "rms", a.op,
              ": kind: expected \"layer\" or \"rms\", got \"", a.kind, "\"");
  TORCH_CHECK(a.gate_activation == "silu" || a.gate_activation == "sigmoid", a.op,
              ": gate_activation: expected \"silu\" or \"sigmoid\", got \"", a.gate_activation,
              "\"");
  TORCH_CHECK(a.eps >= 0 && std::isfinite(a.eps), a.op, ": eps: expected a number >= 0, got ",
              a.eps);
  TORCH_CHECK(a.skip.has_value() == a.skip_weight.has_value(), a.op,
              ": skip and skip_weight come together, got only ", a.skip ? "skip" : "skip_weight");
  check_channels(a, a.weight, "weight");
  check_channels(a, a.bias, "bias");
  check_channels(a, a.skip_weight, "skip_weight");
  if (a.skip) check_headwise_rows(a, *a.skip, "skip");
  if (a.gate) check_headwise_rows(a, *a.gate, "gate");
}

at::Tensor empty_residual_sum(const at::Tensor& x, const at::Tensor& branch) {
  constexpr std::string_view kOp = "residual_norm";
  TORCH_CHECK(x.dim() >= 1, kOp, ": x: expected (...,D), got shape ", x.sizes());
  check_floating(kOp, "x", x);
  check_floating(kOp, "branch", branch);
  check_shape(kOp, "branch", branch, x.sym_sizes(), "x's shape");
  check_device(kOp, "branch", branch, x.device());
  return at::empty(x.sizes(),
                   x.options().dtype(c10::promoteTypes(x.scalar_type(), branch.scalar_type())));
}

ResidualNormGradients residual_gradients(const at::Tensor& sum, const HeadwiseNormGradients& g) {
  return {std::get<0>(g).view(sum.sizes()), std::get<1>(g), std::get<2>(g)};
}

}  // namespace xlstm::ops
