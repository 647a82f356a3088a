#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/block_linear.h"
#include "csrc/ops/block_linear_products.h"
#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

using torch::autograd::variable_list;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Gradients block_linear_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                bool has_bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::block_linear_backward", "")
                             .typed<decltype(block_linear_backward)>();
  return op.call(dy, x, weight, has_bias);
}

class BlockLinear : public torch::autograd::Function<BlockLinear> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    return block_linear(x, weight, bias);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& dy) {
    const variable_list saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const BelowAutogradUnlessRecording guard;
    auto [dx, dweight, dbias] = block_linear_backward(dy[0], saved[0], saved[1], has_bias);
    return {dx, dweight, has_bias ? dbias : at::Tensor()};
  }
};

at::Tensor block_linear_autograd(const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& bias) {
  if (recording(x, weight, bias)) return BlockLinear::apply(x, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  return block_linear(x, weight, bias);
}

template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
at::Tensor block_linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  return block_linear(at::autocast::cached_cast(type, x, kDevice),
                      at::autocast::cached_cast(type, weight, kDevice),
                      at::autocast::cached_cast(type, bias, kDevice));
}

at::Tensor block_linear_meta(const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& bias) {
  check_block_linear_devices(x, weight, bias);
  TORCH_CHECK(weight.dim() == 3, "block_linear: weight: expected (NB,O,I), got ", weight.dim(),
              " dimensions");
  TORCH_CHECK(x.dim() >= 1, "block_linear: x: expected (...,NB*I), got no dimension");
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = weight.sym_size(0) * weight.sym_size(1);
  return at::empty_symint(sizes, x.options());
}

Gradients block_linear_backward_meta(const at::Tensor& dy, const at::Tensor& x,
                                     const at::Tensor& weight, bool has_bias) {
  check_devices("block_linear", x.device(), {{"dy", dy}, {"weight", weight}});
  const c10::SymInt biases = has_bias ? weight.sym_size(0) * weight.sym_size(1) : c10::SymInt(0);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(weight.sym_sizes(), weight.options()),
          at::empty_symint({biases}, weight.options())};
}

}  // namespace

at::Tensor block_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::block_linear", "")
                             .typed<decltype(block_linear)>();
  return op.call(x, weight, bias);
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("block_linear", block_linear_autograd);
  m.impl("block_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCPU, m) {
  m.impl("block_linear", block_linear_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}

TORCH_LIBRARY_IMPL(xlstm, AutocastCUDA, m) {
  m.impl("block_linear", block_linear_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("block_linear", block_linear_meta);
  m.impl("block_linear_backward", block_linear_backward_meta);
}

}  // namespace xlstm::ops
