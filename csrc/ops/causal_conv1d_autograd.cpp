#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/autograd_support.h"
#include "csrc/ops/causal_conv1d.h"
#include "csrc/ops/causal_conv1d_arguments.h"
#include "csrc/ops/common.h"

namespace xlstm::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

CausalConv1dGradients causal_conv1d_backward(const OptionalTensor& dy, const OptionalTensor& dstate,
                                             const at::Tensor& x, const at::Tensor& weight,
                                             const OptionalTensor& bias,
                                             const OptionalTensor& state0,
                                             const OptionalTensor& reset,
                                             const OptionalTensor& cu_seqlens, bool silu) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::causal_conv1d_backward", "")
                             .typed<decltype(causal_conv1d_backward)>();
  return op.call(dy, dstate, x, weight, bias, state0, reset, cu_seqlens, silu);
}

class CausalConv1d : public torch::autograd::Function<CausalConv1d> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& state0,
                               const OptionalTensor& reset, const OptionalTensor& cu_seqlens,
                               bool silu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, weight, or_undefined(bias), or_undefined(state0),
                            or_undefined(reset), or_undefined(cu_seqlens)});
    ctx->saved_data["silu"] = silu;
    auto [y, state] = causal_conv1d(x, weight, bias, state0, reset, cu_seqlens, silu);
    return {y, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const BelowAutogradUnlessRecording guard;
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(7);
    auto [dx, dweight, dbias, dstate0] =
        causal_conv1d_backward(or_absent(grads[0]), or_absent(grads[1]), saved[0], saved[1],
                               or_absent(saved[2]), or_absent(saved[3]), or_absent(saved[4]),
                               or_absent(saved[5]), ctx->saved_data["silu"].toBool());
    return {dx,
            dweight,
            saved[2].defined() ? dbias : at::Tensor(),
            saved[3].defined() ? dstate0 : at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

CausalConv1dOutputs causal_conv1d_autograd(const at::Tensor& x, const at::Tensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& state0,
                                           const OptionalTensor& reset,
                                           const OptionalTensor& cu_seqlens, bool silu) {
  if (recording(x, weight, bias, state0)) {
    const variable_list out = CausalConv1d::apply(x, weight, bias, state0, reset, cu_seqlens, silu);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return causal_conv1d(x, weight, bias, state0, reset, cu_seqlens, silu);
}

// The step has no gradient: a backward pass that reaches it is an error rather than silently
// incomplete.
class CausalConv1dStep : public torch::autograd::Function<CausalConv1dStep> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias, at::Tensor state, bool silu) {
    const at::AutoDispatchBelowAutograd guard;
    return causal_conv1d_step(x, weight, bias, state, silu);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "causal_conv1d_step has no gradient; use causal_conv1d with state0");
  }
};

at::Tensor causal_conv1d_step_autograd(const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias, at::Tensor& state, bool silu) {
  TORCH_CHECK(!recording(state),
              "causal_conv1d_step: state: is changed in place and cannot require a gradient");
  if (recording(x, weight, bias)) return CausalConv1dStep::apply(x, weight, bias, state, silu);
  const at::AutoDispatchBelowAutograd guard;
  return causal_conv1d_step(x, weight, bias, state, silu);
}

at::Tensor causal_conv1d_step_in_place(const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias, at::Tensor& state, bool silu) {
  return write_in_place("causal_conv1d_step", {{"state", state}},
                        [&] { return causal_conv1d_step(x, weight, bias, state, silu); });
}

CausalConv1dOutputs causal_conv1d_meta(const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& state0,
                                       const OptionalTensor& reset,
                                       const OptionalTensor& cu_seqlens, bool silu) {
  check_causal_conv1d_devices({x, weight, bias, state0, reset, cu_seqlens, silu});
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 2,
              "causal_conv1d: x, weight: expected (B,T,C) and (C,W), got ", x.dim(), " and ",
              weight.dim(), " dimensions");
  const c10::SymInt states = cu_seqlens ? cu_seqlens->sym_size(0) - 1 : x.sym_size(0);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({states, weight.sym_size(1) - 1, x.sym_size(2)}, x.options())};
}

CausalConv1dGradients causal_conv1d_backward_meta(
    const OptionalTensor& dy, const OptionalTensor& dstate, const at::Tensor& x,
    const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& state0,
    const OptionalTensor& reset, const OptionalTensor& cu_seqlens, bool silu) {
  check_causal_conv1d_devices({x, weight, bias, state0, reset, cu_seqlens, silu});
  check_devices("causal_conv1d", x.device(), {{"dy", dy}, {"dstate", dstate}});
  const auto like = [&x](const OptionalTensor& input) {
    return input ? at::empty_symint(input->sym_sizes(), input->options())
                 : at::empty({0}, x.options());
  };
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(weight.sym_sizes(), weight.options()), like(bias), like(state0)};
}

at::Tensor causal_conv1d_step_meta(const at::Tensor& x, const at::Tensor& weight,
                                   const OptionalTensor& bias, at::Tensor& state, bool) {
  check_causal_conv1d_step_devices(x, weight, bias, state);
  return at::empty_symint(x.sym_sizes(), x.options());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> causal_conv1d(const at::Tensor& x, const at::Tensor& weight,
                                                 const OptionalTensor& bias,
                                                 const OptionalTensor& state0,
                                                 const OptionalTensor& reset,
                                                 const OptionalTensor& cu_seqlens, bool silu) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::causal_conv1d", "")
                             .typed<decltype(causal_conv1d)>();
  return op.call(x, weight, bias, state0, reset, cu_seqlens, silu);
}

at::Tensor causal_conv1d_step(const at::Tensor& x, const at::Tensor& weight,
                              const OptionalTensor& bias, at::Tensor& state, bool silu) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("xlstm::causal_conv1d_step", "")
                             .typed<decltype(causal_conv1d_step)>();
  return op.call(x, weight, bias, state, silu);
}

TORCH_LIBRARY_IMPL(xlstm, Autograd, m) {
  m.impl("causal_conv1d", causal_conv1d_autograd);
  m.impl("causal_conv1d_step", causal_conv1d_step_autograd);
  m.impl("causal_conv1d_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(xlstm, ADInplaceOrView, m) {
  m.impl("causal_conv1d_step", causal_conv1d_step_in_place);
}

TORCH_LIBRARY_IMPL(xlstm, Meta, m) {
  m.impl("causal_conv1d", causal_conv1d_meta);
  m.impl("causal_conv1d_step", causal_conv1d_step_meta);
  m.impl("causal_conv1d_backward", causal_conv1d_backward_meta);
}

}  // namespace xlstm::ops
