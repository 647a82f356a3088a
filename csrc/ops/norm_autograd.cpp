#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/norm.h"
#include "csrc/ops/norm_arguments.h"

namespace xlstm::ops {
namespace {

using torch::autograd::variable_list;

HeadwiseNormGradients headwise_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& skip,
                                             const OptionalTensor& skip_weight,
                                             const OptionalTensor& gate, double eps,
                                             std::string_view kind,
                                             std::string_view gate_activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::headwise_norm_backward", "")
                             .typed<decltype(headwise_norm_backward)>();
  return op.call(dy, x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation);
}

class HeadwiseNorm : public torch::autograd::Function<HeadwiseNorm> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& skip, const OptionalTensor& skip_weight,
                            const OptionalTensor& gate, double eps, const std::string& kind,
                            const std::string& gate_activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, or_undefined(weight), or_undefined(bias), or_undefined(skip),
                            or_undefined(skip_weight), or_undefined(gate)});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["gate_activation"] = gate_activation;
    return headwise_norm(x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& dy) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutogradUnlessRecording guard;
    auto [dx, dweight, dbias, dskip, dskip_weight, dgate] = headwise_norm_backward(
        dy[0], saved[0], or_absent(saved[1]), or_absent(saved[2]), or_absent(saved[3]),
        or_absent(saved[4]), or_absent(saved[5]), ctx->saved_data["eps"].toDouble(),
        ctx->saved_data["kind"].toStringRef(), ctx->saved_data["gate_activation"].toStringRef());
    const auto where_present = [](const at::Tensor& input, const at::Tensor& grad) {
      return input.defined() ? grad : at::Tensor();
    };
    return {dx,
            where_present(saved[1], dweight),
            where_present(saved[2], dbias),
            where_present(saved[3], dskip),
            where_present(saved[4], dskip_weight),
            where_present(saved[5], dgate),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

at::Tensor headwise_norm_autograd(const at::Tensor& x, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& skip,
                                  const OptionalTensor& skip_weight, const OptionalTensor& gate,
                                  double eps, std::string_view kind,
                                  std::string_view gate_activation) {
  if (recording(x, weight, bias, skip, skip_weight, gate))
    return HeadwiseNorm::apply(x, weight, bias, skip, skip_weight, gate, eps, std::string(kind),
                               std::string(gate_activation));
  at::AutoDispatchBelowADInplaceOrView guard;
  return headwise_norm(x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation);
}

at::Tensor headwise_norm_meta(const at::Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, const OptionalTensor& skip,
                              const OptionalTensor& skip_weight, const OptionalTensor& gate,
                              double eps, std::string_view kind, std::string_view gate_activation) {
  check_headwise_norm_devices(
      {x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation});
  TORCH_CHECK(x.dim() >= 2, "headwise_norm: x: expected (...,NH,DH), got ", x.dim(), " dimensions");
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  sizes.back() = sizes.back() * x.sym_size(-1);
  return at::empty_symint(sizes, x.options());
}

at::Tensor contiguous_like(const OptionalTensor& input, const at::Tensor& otherwise) {
  if (!input) return at::empty({0}, otherwise.options());
  return at::empty_symint(input->sym_sizes(), input->options());
}

HeadwiseNormGradients headwise_norm_backward_meta(
    const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& skip, const OptionalTensor& skip_weight,
    const OptionalTensor& gate, double eps, std::string_view kind,
    std::string_view gate_activation) {
  check_headwise_norm_devices(
      {x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation});
  check_device("headwise_norm", "dy", dy, x.device());
  return {at::empty_symint(x.sym_sizes(), x.options()),
          contiguous_like(weight, x),
          contiguous_like(bias, x),
          contiguous_like(skip, x),
          contiguous_like(skip_weight, x),
          contiguous_like(gate, x)};
}

ResidualNormGradients residual_norm_backward(const OptionalTensor& dsum, const at::Tensor& dy,
                                             const at::Tensor& sum, const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps,
                                             std::string_view kind) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::residual_norm_backward", "")
                             .typed<decltype(residual_norm_backward)>();
  return op.call(dsum, dy, sum, weight, bias, eps, kind);
}

class ResidualNorm : public torch::autograd::Function<ResidualNorm> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                               const at::Tensor& branch, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps, const std::string& kind) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);  // the last sum of a stack has none
    auto [sum, y] = residual_norm(x, branch, weight, bias, eps, kind);
    ctx->save_for_backward({sum, or_undefined(weight), or_undefined(bias)});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["x_type"] = x.scalar_type();
    ctx->saved_data["branch_type"] = branch.scalar_type();
    return {sum, y};
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutogradUnlessRecording guard;
    variable_list wanted(6);
    at::Tensor dx = grads[0];
    if (grads[1].defined()) {
      auto [all, dweight, dbias] = residual_norm_backward(
          or_absent(grads[0]), grads[1], saved[0], or_absent(saved[1]), or_absent(saved[2]),
          ctx->saved_data["eps"].toDouble(), ctx->saved_data["kind"].toStringRef());
      dx = all;
      if (saved[1].defined()) wanted[2] = dweight;
      if (saved[2].defined()) wanted[3] = dbias;
    }
    if (!dx.defined()) return wanted;
    wanted[0] = dx.to(ctx->saved_data["x_type"].toScalarType());
    wanted[1] = dx.to(ctx->saved_data["branch_type"].toScalarType());
    return wanted;
  }
};

ResidualNormResult residual_norm_autograd(const at::Tensor& x, const at::Tensor& branch,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          double eps, std::string_view kind) {
  if (recording(x, branch, weight, bias)) {
    const variable_list result =
        ResidualNorm::apply(x, branch, weight, bias, eps, std::string(kind));
    return {result[0], result[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return residual_norm(x, branch, weight, bias, eps, kind);
}

ResidualNormResult residual_norm_meta(const at::Tensor& x, const at::Tensor& branch,
                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                      double, std::string_view) {
  check_devices("residual_norm", x.device(),
                {{"branch", branch}, {"weight", weight}, {"bias", bias}});
  const auto options = x.options().dtype(c10::promoteTypes(x.scalar_type(), branch.scalar_type()));
  return {at::empty_symint(x.sym_sizes(), options), at::empty_symint(x.sym_sizes(), options)};
}

ResidualNormGradients residual_norm_backward_meta(const OptionalTensor& dsum, const at::Tensor& dy,
                                                  const at::Tensor& sum,
                                                  const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double,
                                                  std::string_view) {
  check_devices("residual_norm", sum.device(),
                {{"dsum", dsum}, {"dy", dy}, {"weight", weight}, {"bias", bias}});
  return {at::empty_symint(sum.sym_sizes(), sum.options()), contiguous_like(weight, sum),
          contiguous_like(bias, sum)};
}

}  // namespace

at::Tensor headwise_norm(const at::Tensor& x, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& skip,
                         const OptionalTensor& skip_weight, const OptionalTensor& gate, double eps,
                         std::string_view kind, std::string_view gate_activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::headwise_norm", "")
                             .typed<decltype(headwise_norm)>();
  return op.call(x, weight, bias, skip, skip_weight, gate, eps, kind, gate_activation);
}

std::tuple<at::Tensor, at::Tensor> residual_norm(const at::Tensor& x, const at::Tensor& branch,
                                                 const OptionalTensor& weight,
                                                 const OptionalTensor& bias, double eps,
                                                 std::string_view kind) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::residual_norm", "")
                             .typed<decltype(residual_norm)>();
  return op.call(x, branch, weight, bias, eps, kind);
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("headwise_norm", headwise_norm_autograd);
  m.impl("headwise_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("residual_norm", residual_norm_autograd);
  m.impl("residual_norm_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("headwise_norm", headwise_norm_meta);
  m.impl("headwise_norm_backward", headwise_norm_backward_meta);
  m.impl("residual_norm", residual_norm_meta);
  m.impl("residual_norm_backward", residual_norm_backward_meta);
}

}  // namespace xlstm::ops
