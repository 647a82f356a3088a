#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/common.h"
#include "csrc/ops/linear_cross_entropy.h"
#include "csrc/ops/linear_cross_entropy_blocks.h"
#include "csrc/ops/rows.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, int64_t ignore_index,
    double soft_cap, std::string_view reduction, bool need_dx, bool need_dweight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::linear_cross_entropy_forward", "")
                             .typed<decltype(linear_cross_entropy_forward)>();
  return op.call(x, weight, target, ignore_index, soft_cap, reduction, need_dx, need_dweight);
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
    const OptionalTensor& dx, const OptionalTensor& dweight, int64_t ignore_index, double soft_cap,
    std::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::linear_cross_entropy_backward", "")
                             .typed<decltype(linear_cross_entropy_backward)>();
  return op.call(grad, x, weight, target, dx, dweight, ignore_index, soft_cap, reduction);
}

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& target, int64_t ignore_index, double soft_cap,
                            const std::string& reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const bool now = reduction != "none";
    const bool need_dx = now && x.requires_grad(), need_dweight = now && weight.requires_grad();
    auto [loss, dx, dweight] = linear_cross_entropy_forward(
        x, weight, target, ignore_index, soft_cap, reduction, need_dx, need_dweight);
    ctx->save_for_backward(
        {x, weight, target, need_dx ? dx : at::Tensor(), need_dweight ? dweight : at::Tensor()});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["soft_cap"] = soft_cap;
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const std::string& reduction = ctx->saved_data["reduction"].toStringRef();
    const BelowAutogradUnlessRecording guard;
    auto [dx, dweight] = linear_cross_entropy_backward(
        grad[0], saved[0], saved[1], saved[2], or_absent(saved[3]), or_absent(saved[4]),
        ctx->saved_data["ignore_index"].toInt(), ctx->saved_data["soft_cap"].toDouble(), reduction);
    const bool now = reduction != "none";
    return {now && !saved[3].defined() ? at::Tensor() : dx,
            now && !saved[4].defined() ? at::Tensor() : dweight,
            at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

at::Tensor linear_cross_entropy_autograd(const at::Tensor& x, const at::Tensor& weight,
                                         const at::Tensor& target, int64_t ignore_index,
                                         double soft_cap, std::string_view reduction) {
  if (recording(x, weight))
    return LinearCrossEntropy::apply(x, weight, target, ignore_index, soft_cap,
                                     std::string(reduction));
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_cross_entropy(x, weight, target, ignore_index, soft_cap, reduction);
}

template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
at::Tensor linear_cross_entropy_autocast(const at::Tensor& x, const at::Tensor& weight,
                                         const at::Tensor& target, int64_t ignore_index,
                                         double soft_cap, std::string_view reduction) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  return linear_cross_entropy(at::autocast::cached_cast(type, x, kDevice),
                              at::autocast::cached_cast(type, weight, kDevice), target,
                              ignore_index, soft_cap, reduction);
}

at::TensorOptions accumulate_options(const at::Tensor& x) {
  return x.options().dtype(accumulate_type(x.scalar_type()));
}

at::Tensor linear_cross_entropy_meta(const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& target, int64_t, double,
                                     std::string_view reduction) {
  check_linear_cross_entropy_devices(x, weight, target);
  const c10::SymIntArrayRef sizes =
      reduction == "none" ? target.sym_sizes() : c10::SymIntArrayRef();
  return at::empty_symint(sizes, accumulate_options(x));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_forward_meta(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, int64_t ignore_index,
    double soft_cap, std::string_view reduction, bool need_dx, bool need_dweight) {
  const auto grad = [&](bool needed, const at::Tensor& input) {
    return needed ? at::empty_symint(input.sym_sizes(), accumulate_options(x))
                  : at::empty_symint({0}, accumulate_options(x));
  };
  return {linear_cross_entropy_meta(x, weight, target, ignore_index, soft_cap, reduction),
          grad(need_dx, x), grad(need_dweight, weight)};
}

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
    const OptionalTensor& dx, const OptionalTensor& dweight, int64_t, double,
    std::string_view reduction) {
  check_linear_cross_entropy_devices(x, weight, target);
  check_devices("linear_cross_entropy", x.device(),
                {{"grad", grad}, {"dx", dx}, {"dweight", dweight}});
  const auto like = [&](const OptionalTensor& unit, const at::Tensor& input) {
    return unit || reduction == "none" ? at::empty_symint(input.sym_sizes(), input.options())
                                       : at::empty_symint({0}, x.options());
  };
  return {like(dx, x), like(dweight, weight)};
}

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& target, int64_t ignore_index, double soft_cap,
                                std::string_view reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::linear_cross_entropy", "")
                             .typed<decltype(linear_cross_entropy)>();
  return op.call(x, weight, target, ignore_index, soft_cap, reduction);
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autograd);
  m.impl("linear_cross_entropy_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear_cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCPU, m) {
  m.impl("linear_cross_entropy",
         linear_cross_entropy_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCUDA, m) {
  m.impl("linear_cross_entropy",
         linear_cross_entropy_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_meta);
  m.impl("linear_cross_entropy_forward", linear_cross_entropy_forward_meta);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_meta);
}

}  // namespace xlstm::ops
